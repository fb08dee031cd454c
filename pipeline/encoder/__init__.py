"""Access to `model/` for encoding: takes chunks of frames, returns raw latents and causal states. Converts errors of `model/` into Lathe's.

- `network`: the network of a job: its identity, loading it
- `running`, `staging`: encode steps on the device; transfers to it and back
- `clip_states`, `device_memory`: causal states of clips between their steps; bytes free on the device
- `compiling`: what `torch.compile` needs, costs and saves
- `conditions`: the latents of `i2v_cond`
- `step_budget`: number of chunks and frames per step
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
