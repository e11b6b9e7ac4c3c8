"""The mathematics of diffusion: processes, stages, times, losses, solvers. Nothing here knows networks or ranks."""
