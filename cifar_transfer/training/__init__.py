"""Training: the classifier, its optimizer, what trains when, and the run around it."""
