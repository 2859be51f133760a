"""Results: what a network predicted, the plots of it, and what a run reports."""
