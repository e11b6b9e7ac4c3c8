"""Code that exports carry along: it runs beside diffusers and imports nothing of this package."""
