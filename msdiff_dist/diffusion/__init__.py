"""Pure maths: processes, stages, timesteps, losses, solvers."""
