"""Who runs the stages: one encode loop per encoder, inline in this process or on Ray actors. The only place where Ray appears.

`driver` is the front door. `dispatch` decides, `crew`/`ray_crew` carry out; `encode_loop` owns an encoder, `feed` and `lanes` its
decoders, `attempt` each shard. Only the `ray_*` files import Ray.
"""
