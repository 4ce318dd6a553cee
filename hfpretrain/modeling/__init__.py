"""From a config to a model that trains: building, initial weights, loss, optimizer and schedule."""
