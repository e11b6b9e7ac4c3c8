"""The msdiff command: one small file a verb, no logic."""
