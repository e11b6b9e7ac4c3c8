"""Programs over a whole recipe: training, encoding, dividing time into stages, ablations."""
