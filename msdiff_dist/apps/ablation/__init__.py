"""`msdiff ablate`: variants and seeds trained under one compute budget, and the report on them."""
