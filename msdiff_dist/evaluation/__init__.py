"""Measures of what a run learned."""
