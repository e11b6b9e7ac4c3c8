"""Solvers of the reverse process: they carry noise to data."""

from msdiff_dist.diffusion.solvers.sampler import SOLVERS, ChurnConfig, SamplerConfig, solve
from msdiff_dist.diffusion.solvers.solver import Denoise, Solver, StageOf

__all__ = ["SOLVERS", "ChurnConfig", "Denoise", "SamplerConfig", "Solver", "StageOf", "solve"]
