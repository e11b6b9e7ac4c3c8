"""Jobs on SLURM clusters."""
