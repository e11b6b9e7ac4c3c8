"""Variants and seeds under one compute budget, and the report of them."""
