"""Shards to samples: WebDataset lanes, order, decoding."""
