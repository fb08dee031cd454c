"""Operations on a finished or running output. `publish` writes snapshots; the others change nothing.

- `status`: how far an output is
- `inspect`: one file, index or receipt, a whole output, or a snapshot
- `verify`: every receipt, file, byte and offset checked
- `publish`, `publish_checks`: the next snapshot; what must hold before it is visible
- `diff`: two snapshots compared
- `statistics`, `statistics_plot`: values of stored latents per channel and bucket, and as a picture
"""
