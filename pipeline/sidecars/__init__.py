"""Sidecar sets of an output: named tensors by caption or by row id, such as text embeddings (docs/formats.md). No torch.

- `names`: keys of their objects, and of their rows
- `description`: the set object: what the tensors are and what made them
- `files`, `file_index`: a file of rows, written; where each tensor lies in it
- `receipts`: which units of work are done
- `storing`: rows of a unit into a file, an upload and a receipt
- `versions`: numbered lists of the files that count
- `reading`: tensors of one version by key
"""
