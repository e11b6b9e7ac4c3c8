"""The acceptance run of a machine: is what it computes right, does it resume, how fast is it."""
