"""Jobs: submitting runs and commands to SLURM or in the background, and watching them."""
