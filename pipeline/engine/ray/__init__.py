"""Ray: encoders, decoders and training runs as actors. Nothing outside this package imports Ray.

- `session`, `folder`: a private Ray or a cluster; the session folder of a private Ray
- `pool`, `actors`: encoders as the driver sees them; the actor class
- `lanes`: decoder actors
- `losses`: why an actor is gone
- `training`: a training run on several GPUs
"""
