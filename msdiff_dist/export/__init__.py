"""Trained weights for use: their description, their files in plain safetensors, and averages made after training."""
