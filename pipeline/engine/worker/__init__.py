"""One encoder: shard attempts, batches of chunks, files."""
