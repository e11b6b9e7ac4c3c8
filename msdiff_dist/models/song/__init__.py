"""The U-Nets of score-based diffusion: DDPM++ and NCSN++ (Song et al. 2021; Karras et al. 2022)."""
