"""Fuzzing of every parser of bytes that this package did not write itself."""
