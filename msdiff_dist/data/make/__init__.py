"""Shards are made here: from data sets, folders and latents, and checked."""
