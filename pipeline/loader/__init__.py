"""Loader of published latents: an order that can be proven, resumed anywhere.

- `dataset`: `LatentDataset`, rows of one snapshot; `row`, one of them; `spec`, the network that made them
- `files`, `buckets`, `file_index`, `columns`: files and rows that count; rows by shape; byte indexes; columns that are not tensors
- `filter`: rows for which an SQL expression is true
- `fetch`: ranged reads of tensors into given memory
- `rules`: how many latents make a global batch
- `draws`: counter-based random numbers
- `epoch`, `mixture`, `order`: batches of one epoch; which dataset a step takes; both together
"""
