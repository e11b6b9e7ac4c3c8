"""Checkpoints: a run's state on disk, by parameter name, so that any layout of ranks resumes any other."""
