"""Training of a recipe: its plan and cost, its ranks, and the parts of a run put together."""
