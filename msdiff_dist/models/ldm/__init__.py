"""Family `ldm`: the U-Net of latent diffusion, with one decoder per stage."""
