"""Operations on a finished or running output.

- `status`: progress of an output
- `inspect`: description of one file, index or receipt, of a whole output, or of a snapshot
- `verify`: check of every receipt, file, byte and offset
- `publish`, `publish_base`, `snapshot_record`: the next snapshot; what it starts from; its record
- `lost_receipts`, `open_work`: what the parent covers and is gone; what is known not to be done
- `publish_checks`, `file_checks`, `removed_check`: checks before it is visible
- `delta_log`, `delta_contents`, `delta_writing`, `delta_actions`: snapshots as a Delta Lake table: bringing it up to date; what is there;
  writing; the protocol
- `takedown`, `takedown_names`, `taken_files`: hiding what users name; what names stand for; files with hidden rows
- `gc`, `gc_plan`, `gc_builds`, `retention`: deletion; what may go; running builds and the store's clock; which snapshots stay
- `diff`: differences between two snapshots
- `statistics`, `statistics_plot`: values of stored latents per channel and bucket, as numbers and as a picture
"""
