"""One training run: planned, started on this machine, put together on each rank."""
