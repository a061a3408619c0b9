"""Sources of models: the hub, a local folder, random weights, and the families trained for this project."""
