"""Loader of published latents: an order that can be proven, resumed anywhere, read at the speed of the disk or the network.

For users: `LatentDataset` (`dataset`), `LatentLoader` (`loader`), `Batch` (`batch`), `Tokens` and `Pack` (`rules`), `Weights` (`mixture`), `Prefix`
and `Window` (`crops`), `TensorCache` (`cache`).

- `dataset`, `row`, `spec`: rows of one snapshot; one of them; the network that made them
- `files`, `buckets`, `file_index`, `columns`: files and rows that count; rows by shape; byte indexes; columns that are not tensors
- `filter`: rows for which an SQL expression is true
- `rules`, `draws`, `epoch`, `mixture`, `order`: size of a global batch; random numbers; batches of an epoch; which dataset a step takes; all together
- `loader`, `state`, `stats`, `assembly`: batches for one rank; where it stands; what it counts; its parts put together
- `slots`, `fetch`, `reading`, `memory`, `cache`: rows of a batch in their files; ranged reads; in parallel; memory used again; local copies
- `maker`, `values`, `crops`, `captions`: rows into a batch; values for training; first frames only; one caption of several
- `iterable`: batches as torch's `IterableDataset`
"""
