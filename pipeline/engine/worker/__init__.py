"""One encoder: shards in, data files and receipts out.

- `build_context`: what all processes of a build agree on: rules, fingerprint, file metadata
- `pool`: the interface of a set of workers, and the one that runs in this process
- `encode_loop`: frames from the feed, batches through the network, latents to the attempts
- `batching`, `latent_spool`: which chunks share a step; the latents of a clip, collected
- `attempt`: one attempt at one shard, from fetch to receipt
- `shard_scope`, `sample_account`, `shard_result`: which samples an attempt covers; what became of each; the outcome
- `clip_id`, `clip_writing`: ids of latents; the thread that writes clips
- `progress_counter`: everything that moves, so that a hang can be told from slow work
"""
