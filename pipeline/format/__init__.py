"""Format of a latent file: columns, tensors, byte index. Shared by writer and readers; no torch, no access to stores.

docs/formats.md is the specification.

- `layout`: names of the objects of an output, by format version
- `card`: data card of an output, and what Hugging Face takes for its data
- `columns`: scalar columns and tensors of one row
- `tensors`: storage types, hashes, statistics and checks of latent arrays
- `codec`: tensors stored as int8 or zstd
- `stored`: names of what a row stores beside its scalar columns
- `index`: the byte index beside a data file
"""
