"""Models made from other models: stages grown from a unified model, merged, or extracted."""
