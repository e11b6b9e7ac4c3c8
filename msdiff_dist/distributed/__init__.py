"""Several ranks as one job: where stages and samples go, the engines, agreement, and starting processes."""
