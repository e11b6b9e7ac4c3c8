"""`msdiff evaluate` and `msdiff compare`: how good images are, in named feature spaces."""
