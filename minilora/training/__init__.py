"""Training: a step over shards and threads, the loop, methods by name."""
