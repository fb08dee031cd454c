"""Encoders, decoders and training runs as Ray actors. No other package imports Ray.

- `session`, `folder`: a private Ray or a cluster; the session folder of a private Ray
- `pool`, `encoder_state`, `actors`: encoders as the driver sees them; the actor class
- `placement`: whether encoders and decoders fit on the nodes, before any is created
- `cluster_watch`: thread that asks for nodes that live and nodes that go away
- `lanes`: decoder actors
- `metrics`: Prometheus series of encoders and driver
- `losses`, `node_health`: why an actor was lost, and failed starts of encoders; nodes on which encoders fail
- `task_pool`: actors that run tasks of any kind, for `lathe embed`
- `training`: a training run on several GPUs
"""
