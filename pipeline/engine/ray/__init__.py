"""Encoders, decoders and training runs as Ray actors. No other package imports Ray.

- `session`, `folder`: a private Ray or a cluster; the session folder of a private Ray
- `pool`, `actors`: encoders as the driver sees them; the actor class
- `lanes`: decoder actors
- `metrics`: Prometheus series of encoders and driver
- `losses`: why an actor was lost, and failed starts of encoders
- `training`: a training run on several GPUs
"""
