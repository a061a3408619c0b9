"""When tokens leave: one schedule a file."""
