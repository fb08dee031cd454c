"""Loader of published latents: an order that can be proven, resumed anywhere, read at the speed of the disk or the network.

Importing this package loads neither torch nor pyarrow; its public names are loaded when they are used.

- `dataset`, `row`, `file_rows`, `spec`: rows of one snapshot; one of them; those of a file; the network that made them
- `files`, `buckets`, `file_index`, `columns`: files and rows that count; rows by shape; byte indexes; columns without tensors
- `filter`, `expression`, `ranges`: rows for which an SQL expression is true; what it says; what the manifest knows of each file
- `arguments`, `rules`, `draws`: numbers of one type; size of a global batch; random numbers
- `epoch`, `packing`, `part`, `mixture`, `order`: batches of an epoch; packed ones; epoch after epoch; which dataset a step takes; all
  together
- `loader`, `state`, `stats`, `assembly`: batches for one rank; where it stands; what it counts; its parts put together
- `threads`, `read_ahead`, `takedown_watch`, `ranks`: threads that can be stopped; batches made ahead; takedowns during a run; check that
  all ranks read one order
- `slots`, `fetch`, `open_files`, `reading`, `decoding`, `memory`, `cache`: rows of a batch in their files; ranged reads; files kept open;
  in parallel; int8 and zstd; memory used again; local copies
- `maker`, `batch`, `values`, `crops`, `captions`, `variants`: rows into a batch; its fields; values for training; first frames only; one
  caption of several; one variant of several
- `sidecars`: tensors of sidecar sets beside each latent; what follows where a row has none
- `iterable`, `map_style`: batches and rows as datasets of torch
"""

from __future__ import annotations

from typing import Any

_HOMES = {
    "LatentDataset": "dataset",
    "LatentLoader": "loader",
    "Batch": "batch",
    "Tokens": "rules",
    "Pack": "rules",
    "Weights": "mixture",
    "Prefix": "crops",
    "Window": "crops",
    "TensorCache": "cache",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline.loader' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pipeline.loader.{_HOMES[name]}"), name)
