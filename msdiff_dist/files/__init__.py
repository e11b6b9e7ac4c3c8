"""Files and folders that are complete or absent, whatever happens."""
