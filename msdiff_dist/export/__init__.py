"""Weights to use: described, written as plain safetensors, averaged after training."""
