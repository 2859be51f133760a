"""Training: the classifier, its optimizer, what trains when, and a run from its first step to its resumption."""
