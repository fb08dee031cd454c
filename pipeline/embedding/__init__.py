"""Making of sidecar sets: `lathe embed` encodes captions or images, `lathe sidecar import` takes tables that others made.

- `checkpoint`: files of an encoder; what it is, for the fingerprint. No torch
- `texts`, `images`: encoders by transformers
- `units`: what a snapshot needs and the set does not have yet, in units of work
- `worker`: one encoder: units in, receipts out
- `run`: a run of `lathe embed`, in this process or on Ray
- `table`, `importing`: a table of embeddings; its import
- `upkeep`, `pruning`: what sets an output has, check of their files; removal of what no row needs any more
"""
