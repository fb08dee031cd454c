"""Operations on a finished or running output. `publish` and `compact` write snapshots, `takedown` and `gc` change what is shown and stored.

- `status`, `run_logs`: progress of an output; logs of its builds
- `why`, `name_search`, `open_input`: history of one input; search for its name; inputs without a receipt
- `listed_inputs`: inputs of a job as they are now
- `inspect`: description of one file, index or receipt, of a whole output, or of a snapshot
- `verify`, `verify_files`, `verify_published`: check of every receipt, file, byte and offset; of one file; of what snapshots name
- `publish`, `publish_base`, `snapshot_record`: the next snapshot; what it starts from; its record
- `lost_receipts`, `open_work`: what the parent covers and is gone; what is known not to be done
- `publish_checks`, `file_checks`, `removed_check`: checks before it is visible
- `delta_log`, `delta_contents`, `delta_writing`, `delta_actions`: snapshots as a Delta Lake table: bringing it up to date; what is there;
  writing; the protocol
- `takedown`, `takedown_names`, `taken_files`: hiding what users name; what names stand for; files with hidden rows
- `member_search`: main videos of paired videos, by the name of a member
- `gc`, `gc_plan`, `gc_restore`, `gc_builds`, `retention`: deletion; what may go; retired receipts that count again; running builds and the
  store's clock; which snapshots stay
- `compact`, `compact_plan`, `compact_hidden`, `stored_rows`, `compact_files`, `compact_tables`: small files merged as the next snapshot;
  which; files none of whose rows count; rows of a finished file; writing; tables of that snapshot
- `hugging_face`: data files that `.huggingface.yaml` names
- `diff`: differences between two snapshots
- `statistics`, `statistics_plot`: values of stored latents per channel and bucket, as numbers and as a picture
"""
