"""Ledger of an output: which sources are done, which rows count, what is published.

- `latent_set`: what the output is, and its format version
- `receipts`: the receipt of each finished shard, created once
- `summaries`: what a run needs of each receipt, cached
- `overlaps`, `counted`: which receipt counts for a source; receipts as readers see them
- `totals`: sums over receipts, by fingerprint and bucket
- `snapshots`, `manifest`: published snapshots and their tables
- `versions`, `decisions`, `candidate`: which version of an input counts; what counts of each receipt; what the next snapshot would hold
- `takedowns`: records that hide rows from every reader
"""
