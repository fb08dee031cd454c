"""`fetch(uri)` for model checkpoints that live in object storage."""
