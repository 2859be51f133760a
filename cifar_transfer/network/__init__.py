"""Networks: found by name, with their weights, fitted to small images."""
