"""Files on disk: complete or absent, claimed by one command, shared among processes, checked by digest."""
