"""The U-Net of latent diffusion."""
