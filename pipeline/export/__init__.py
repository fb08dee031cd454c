"""Export of published latents into the formats of trainers. `pipeline.cli.export_command` is its command line.

- `rows`: rows of a snapshot as an export reads them
- `dataset`: those of a published snapshot, over the loader
- `models`, `values`: which latents a trainer's model takes; values normalised and in its type
- `texts`, `sidecar_texts`: text embeddings from the user's table, or from sidecar sets of the output
- `target`: what a target is
- `journal`: which files of the directory hold which rows; refuses what others made, undoes what a kill left
- `run`: compares a directory with a snapshot, drops, adds
- `fastvideo`, `ltx2`, `musubi`, `automodel`, `megatron_bridge`, `wds`: one file a target; `tar_part`: tars of the last two
- `targets`: all of them by name; an export with the options of the command line
"""
