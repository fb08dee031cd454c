"""Ledger of an output: which sources are done, which rows count, what is published.

- `latent_set`: the set object, and the format version
- `receipts`: the receipt of each finished shard, created once
- `summary`, `summary_tables`, `summaries`: facts of a receipt that a run needs; as Parquet; of all receipts, cached
- `overlaps`, `counted`: which receipt counts for a source; the part of each receipt that counts
- `part_statistics`: statistics of receipts of which some rows do not count
- `lookahead`: threads that read ahead
- `copies`: where compactions put the rows of receipts
- `totals`: sums over receipts, by fingerprint and bucket
- `snapshots`, `record_checks`, `manifest`: published snapshots; what their records have to hold; their tables
- `versions`, `decisions`, `candidate`: which version of an input and which part of a receipt count; contents of the next snapshot
- `addresses`: `OUTPUT@N` as users write it
- `lease`: one process at a time does what is named
- `takedowns`, `takedown_record`: records that hide rows from every reader; one record
- `row_search`: rows by id or by the key of their sample
"""
