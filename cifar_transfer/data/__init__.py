"""Data: from image files to batches on their way to the network."""
