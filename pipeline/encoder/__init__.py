"""Access to `model/` for encoding: chunks of frames in, raw latents and causal states out. Foreign errors become ours here.

- `network`: which network a job means, loaded
- `running`, `staging`: steps on the device; transfers to it and back
- `step_budget`: how many chunks and frames go through at once
- `environment`: the machine, for receipts
- `examination`: `lathe check`
"""

from model.interface import LatentSpec
from pipeline.encoder.network import Network, cuda_available, identify, known_spec, resolve_device
from pipeline.encoder.running import Encoded, Encoder, Launched

__all__ = [
    "Encoded",
    "Encoder",
    "LatentSpec",
    "Launched",
    "Network",
    "cuda_available",
    "identify",
    "known_spec",
    "resolve_device",
]
