"""Samples of trained models, and scores of them."""
