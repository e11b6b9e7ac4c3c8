"""Placement, routing and engines over process groups."""
