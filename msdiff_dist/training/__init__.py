"""One run's training: its data feed, its step, its averages, and its folder."""
