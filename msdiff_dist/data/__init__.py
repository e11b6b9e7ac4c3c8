"""From shards to the samples of each step: finding shards, ordering, reading and decoding."""
