"""Multi-stage latent diffusion: one shared encoder, one decoder per timestep stage, stage-parallel under DeepSpeed."""

__version__ = "0.1.0"
