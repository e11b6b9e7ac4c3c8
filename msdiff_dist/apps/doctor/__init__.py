"""What `msdiff doctor` looks at: whether this machine and its software can train."""
