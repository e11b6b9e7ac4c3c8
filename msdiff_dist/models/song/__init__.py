"""Families `ddpmpp`, `ncsnpp`, `ncsnpp_vp`: the U-Nets of score-based diffusion (2011.13456; 2206.00364)."""
