"""Weights in and out of the formats that people have: one file per format, key maps that go both ways."""
