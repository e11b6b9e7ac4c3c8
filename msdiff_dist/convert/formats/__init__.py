"""One module a format: what it looks like and how it maps to this package's parameter names."""
