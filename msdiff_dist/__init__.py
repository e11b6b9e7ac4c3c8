"""Multi-stage latent-diffusion training: a shared encoder, one decoder per timestep stage, stage-parallel under DeepSpeed ZeRO."""

__version__ = "0.1.0"
