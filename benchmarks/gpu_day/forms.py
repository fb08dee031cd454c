"""A network in each form that the table compares, from planes in host memory to latents in host memory.

`plain`: the definition, eager, whole clips. `compiled+graphs`: the definition by `torch.compile` in mode `reduce-overhead`, its colour
conversion included. The others are what builds run (`pipeline.encoder.Encoder`), in chunks of 16 frames with causal state:
`compiled steps` with `engine.compile`, `kernels` without it and without graphs, `kernels+graphs` with them. Where the network has no GPU
kernels (float32, other families, a CPU), the last two are its definition in eager steps; the row says which backend ran.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import model
from model import registry
from model.colour import rgb_map
from model.definition import definition
from model.kernels.graphs import StepGraphs
from pipeline.encoder.running import Encoder
from pipeline.encoder.staging import CudaStaging, HostStaging

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu_day.settings import Clip, Settings
    from benchmarks.machine import Machine

FORMS = ("kernels+graphs", "kernels", "plain", "compiled steps", "compiled+graphs")
OF_BUILDS = ("kernels+graphs", "kernels", "compiled steps")
MATRIX = "bt709"
CHUNK = 16  # frames of a chunk after the first, as builds have it
DISTINCT = 8  # different clips of a batch: no copy comes from the cache, and host memory stays small


@dataclass(frozen=True)
class NetworkChoice:
    """What `Encoder` reads of a job's model section: the network with random weights."""

    name: str
    config: dict[str, Any] | None
    checkpoint: str | None = None
    untrained: int | None = 0


@dataclass(frozen=True)
class Chunk:
    """What `Encoder` reads of a `FrameChunk`. Not that class: `pipeline.records` imports pydantic, which such a machine may lack."""

    clip: int
    planes_T3HW: np.ndarray
    pts_s: tuple[float, ...]
    color_matrix: str
    first: bool
    last: bool


@lru_cache(maxsize=1)  # forms of one shape follow each other; the largest take seconds to draw
def random_clips(clip: Clip, batch: int) -> list[np.ndarray]:
    """Planes `T 3 H W` of `batch` clips, uint8. Not to be written to."""
    frames, height, width = clip
    rng = np.random.default_rng(0)
    made = [rng.integers(16, 236, (frames, 3, height, width), np.uint8) for _ in range(min(batch, DISTINCT))]
    return [made[i % len(made)] for i in range(batch)]


def weights_of(name: str, config: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Complete configuration and random weights, the same for every form."""
    full = registry.complete(name, config)
    module = importlib.import_module(registry.family_of(name).module)
    return full, module.random_weights(full, 0)


class DefinitionForm:
    """`plain` and `compiled+graphs`."""

    def __init__(self, name: str, form: str, dtype: str, settings: Settings, machine: Machine) -> None:
        full, weights = weights_of(name, settings.config(name))
        self.dtype = getattr(torch, dtype)
        network: Any = definition(name, full, weights)
        network = network.eval().requires_grad_(False).to(machine.device, self.dtype)
        self.range = model.spec(name, full).value_range
        self.device = machine.device
        self.staging = CudaStaging(machine.device) if machine.cuda else HostStaging()
        low, high = self.range

        def encode(planes_BT3HW: torch.Tensor, map_B34: torch.Tensor) -> torch.Tensor:
            rgb = torch.einsum("brc,btchw->brthw", map_B34[:, :, :3], planes_BT3HW.float())
            video = (rgb + map_B34[:, :, 3, None, None, None]).clamp(low, high)
            mean: torch.Tensor = network.encode(video.to(self.dtype)).mean
            return mean

        self.encode: Callable[..., torch.Tensor] = encode
        if form != "plain":
            # All networks, dtypes and shapes share the code of `encode`; torch's own limit of 8 versions of it is an error here.
            # Not dynamic: torch would compile the second shape for any shape, and rows would compare other code.
            torch._dynamo.config.recompile_limit = 64
            options = {"mode": "reduce-overhead"} if machine.cuda else {}
            self.encode = torch.compile(encode, fullgraph=True, dynamic=False, backend=settings.compiler, **options)

    def launch(self, clips: Sequence[np.ndarray]) -> Callable[[], Any]:
        """Launches the encode of a batch; returns a function that waits for its latents."""
        planes = self.staging.upload(clips)
        colours = rgb_map([MATRIX] * len(clips), self.range).to(self.device, torch.float32)
        with torch.inference_mode():
            latents = self.encode(planes, colours)
        return self.staging.download(latents)

    def end_case(self) -> None:
        """Nothing to forget between cases."""

    def facts(self) -> dict[str, Any]:
        """Facts for the row."""
        return {}


class BuildForm:
    """`OF_BUILDS`: steps of the encoder that builds use."""

    def __init__(self, name: str, form: str, dtype: str, settings: Settings, machine: Machine) -> None:
        choice: Any = NetworkChoice(name, settings.config(name))
        compiled = form == "compiled steps"
        self.encoder = Encoder(choice, str(machine.device), dtype, compiled=compiled)
        # The rehearsal compiles nothing: steps are the same functions, run eagerly.
        self._stance = "force_eager" if compiled and settings.compiler == "eager" else "default"
        self.vae: Any = self.encoder._vae
        self.graphs: StepGraphs | None = getattr(getattr(self.vae, "fused", None), "graphs", None)
        if form == "kernels" and self.graphs is not None:
            self.vae.fused.graphs = self.graphs = None

    def launch(self, clips: Sequence[np.ndarray]) -> Callable[[], Any]:
        """Launches all steps of a batch, each with the states of the one before; returns a function that waits for the latents."""
        frames = clips[0].shape[0]
        lead = self.encoder.spec.lead_frames
        ends = [*range(min(lead + CHUNK, frames), frames, CHUNK), frames]
        states: list[Any] = [None] * len(clips)
        pending, start = [], 0
        for stop in ends:
            times = tuple(float(n) for n in range(start, stop))
            chunks: Any = [
                Chunk(i, clip[start:stop], times, MATRIX, first=start == 0, last=stop == frames)
                for i, clip in enumerate(clips)
            ]
            with torch.compiler.set_stance(self._stance):
                step = self.encoder.launch(chunks, states)
            states, start = step.states, stop
            pending.append(step.results)
        return lambda: [results() for results in pending]

    def end_case(self) -> None:
        """Frees the graphs of this case, which would take places and memory of others, and forgets what did not fit."""
        self.encoder._budget._caps.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def facts(self) -> dict[str, Any]:
        """Backend, graphs that were recorded, and whether steps had to be halved for lack of memory."""
        return {
            "backend": getattr(self.vae, "backend", "plain"),
            "graphs_kept": 0 if self.graphs is None else len(self.graphs),
            "halved": bool(self.encoder._budget._caps),
        }


def make(name: str, form: str, dtype: str, settings: Settings, machine: Machine) -> DefinitionForm | BuildForm:
    """The network `name` with random weights in one of `FORMS`."""
    kind = BuildForm if form in OF_BUILDS else DefinitionForm
    return kind(name, form, dtype, settings, machine)
