"""One encoder: shards in, data files and receipts out.

- `build_context`: settings that all processes of a build share, fingerprint, file metadata
- `pool`: interface of a set of workers, and the pool of one worker in this process
- `encode_loop`: frames from the feed, batches through the network, latents to the attempts
- `open_video`: clips of a video and its paired videos on their way through the network
- `batching`, `latent_spool`: chunks that share a step; buffer of a clip's latents
- `attempt`, `shard_reading`: one attempt at one shard, from fetch to receipt; its thread that reads samples
- `shard_scope`, `sample_account`, `shard_result`: samples that an attempt covers; their counts; the outcome
- `clip_id`, `clip_writing`: ids of latents; the thread that writes clips
- `death_record`, `blamed_video`: file that says why a process ended; videos that end workers
- `device_fault`, `load_progress`: errors of a GPU, recognised by their text; progress of loading a network
- `progress_counter`, `worker_stats`, `loop_counts`: counts all work, to distinguish a hang from slow work; live numbers for the driver
"""
