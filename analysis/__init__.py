"""From records to numbers, tables and plots. Reads files; imports no torch."""
