"""Weights into and out of the formats that people already have."""
