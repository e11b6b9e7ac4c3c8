"""Code that exports to diffusers bring along. It needs torch and diffusers, and imports nothing of this package."""
