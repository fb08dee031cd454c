"""The only door to `model/`: chunks of frames in, raw latents and causal states out.

`network` (which network a job means), `running` (steps on the device), `step_budget` (how much goes through at once), `staging` (the way
to the device and back), `examination` (`lathe check`). Foreign errors become ours here.
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
