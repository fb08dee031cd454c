"""Suspicions about whole steps and about memory: G3, G5, G6, G7, G8, G9 and G12. Named and called by `suspicions`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu_day import forms
from model.kernels.graphs import EAGER_RUNS, StepGraphs
from model.leanvae.fast import layers
from model.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu_day.settings import Settings
    from benchmarks.machine import Machine

BLOCKS = (1024, 2048, 4096, 8192, 16384)
REPEATS = 5
LEFT_FREE = 200 << 20  # bytes, for G9


def _prepared(settings: Settings, machine: Machine, form: str = "kernels+graphs") -> forms.BuildForm:
    return forms.BuildForm(settings.network, form, settings.dtypes[0], settings, machine)


def _steady(machine: Machine, form: forms.BuildForm, clips: Sequence[np.ndarray]) -> float:
    """Least seconds of a batch once its steps are replayed."""
    for _ in range(EAGER_RUNS + 2):
        form.launch(clips)()
    return min(machine.clock(lambda: form.launch(clips)()) for _ in range(REPEATS))


def token_block(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G3: the packed product of 8192 tokens does not stay in the level-2 cache. Milliseconds of a batch by block of tokens."""
    clips = forms.random_clips(settings.clips[0], settings.batches[0])
    before, found = layers.BLOCK, dict[str, Any]()
    try:
        for block in BLOCKS:
            layers.BLOCK = block
            found[str(block)] = {"ms": 1e3 * _steady(machine, _prepared(settings, machine), clips)}
    finally:
        layers.BLOCK = before
    return {"ms_by_block": found, "in_use": before}


def varied_batches(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G5: few graphs replay while decoding is the limit and batches vary. Batches are drawn evenly; graphs are kept by rounded batch.

    Recordings, replays and rows of padding are counted on shapes alone, the same on any machine; on CUDA the steps also run, without graphs
    and with them.
    """
    clip, largest = settings.clips[0], settings.varied_largest
    drawn = np.random.default_rng(0).integers(1, largest + 1, settings.varied_steps).tolist()
    found: dict[str, Any] = {"steps": len(drawn), "largest_batch": largest} | graph_uses(drawn)
    if not machine.cuda:
        return found
    clips = forms.random_clips(clip, largest)
    for name, form in (("without_s", "kernels"), ("graphs_s", "kernels+graphs")):
        prepared = _prepared(settings, machine, form)

        def build(prepared: forms.BuildForm = prepared) -> None:
            for batch in drawn:
                prepared.launch(clips[:batch])()

        found[name] = machine.clock(build)
    return found


def graph_uses(batches: Sequence[int]) -> dict[str, int]:
    """How often `StepGraphs` records and replays for steps of these batches, with how many rows, and rows of padding."""
    uses = {"recorded": 0, "replayed": 0, "rows": 0, "padding": 0}

    def record(step: Any, tensors: Any, batch: int) -> Callable[..., Any]:
        uses["recorded"] += 1

        def replay(inputs: Sequence[torch.Tensor]) -> Any:
            rows = len(inputs[0])
            uses["replayed"] += 1
            uses["rows"] += rows
            uses["padding"] += batch - rows
            return step(*inputs)

        return replay

    graphs = StepGraphs(record)
    for batch in batches:
        graphs.run("step", lambda x: (x,), (torch.empty((batch, 1)),))
    return uses


def graph_memory(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G6: idle memory of graphs must not count as free. Bytes before and after four recordings, and after a clear.

    `reserved - allocated` grows by the graphs' pool; `counted_as_free` must fall by what recording took from the device.
    """
    cuda, found, form = torch.cuda, dict[str, Any](), _prepared(settings, machine)

    def now() -> dict[str, int]:
        cuda.synchronize()
        reserved, allocated = cuda.memory_reserved(machine.device), cuda.memory_allocated(machine.device)
        return {"reserved": reserved, "allocated": allocated, "counted_as_free": form.encoder._memory.free()}

    form.launch(forms.random_clips(settings.clips[0], 1))()
    cuda.empty_cache()
    found["before"] = now()
    for batch in (64, 32, 16, 8):
        clips = forms.random_clips(settings.clips[0], batch)
        for _ in range(EAGER_RUNS + 2):
            form.launch(clips)()
    cuda.empty_cache()
    found["with_graphs"] = now() | {"graphs": len(form.graphs or ())}
    form.end_case()
    cuda.empty_cache()
    found["cleared"] = now()
    return found


def bytes_by_batch(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G7: bytes per pixel measured on a small first step are too high, because workspaces are in them. By batch, at the smallest frame."""
    small = replace(settings, clips=((17, 64, 64),)) if machine.cuda else settings
    form, found = _prepared(small, machine), dict[str, Any]()
    for batch in sorted(small.batches):
        form.launch(forms.random_clips(small.clips[0], batch))()
        frames, height, width = small.clips[0]
        budget = form.encoder._budget
        found[str(batch)] = {
            "bytes_per_pixel": budget._cost.get((height, width)),
            "allowed": budget.chunks(frames, height, width),
        }
    return {"by_batch": found}


def second_device(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G8: a graph recorded on the second device after one on the first. Raises what torch raises; gives the largest difference."""
    import model

    vaes = [model.load(settings.network, untrained=0, device=f"cuda:{n}", dtype=settings.dtypes[0]) for n in (0, 1)]
    planes = torch.from_numpy(forms.random_clips(settings.clips[0], 1)[0][None])
    means = []
    for vae in vaes:
        for _ in range(EAGER_RUNS + 2):
            mean = vae.encode_planes(planes, [forms.MATRIX])[0].mean
        means.append(mean.cpu())
    return {"difference": float((means[0] - means[1]).abs().max()), "graphs": [len(vae.fused.graphs) for vae in vaes]}


def nearly_full(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G9: out-of-memory errors of libraries kill the shard. Leaves 200 MB free and encodes a new shape: it halves, or which error comes."""
    form = _prepared(settings, machine)
    clips = forms.random_clips(settings.clips[0], settings.batches[0])
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(machine.device)
    filled = torch.empty(max(0, free - LEFT_FREE), dtype=torch.uint8, device=machine.device)
    found: dict[str, Any] = {"filled_bytes": filled.nbytes}
    try:
        form.launch(clips)()
        found |= {"encoded": True, **form.facts()}
    except Exception as error:  # noqa: BLE001 - which error comes is the finding
        found |= {"error": f"{type(error).__name__}: {str(error)[:300]}", "recognised": is_out_of_memory(error)}
    return found


def download(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G12: latents are copied to the host on the compute stream, which then idles. Milliseconds of a batch with and without that copy."""
    form = _prepared(settings, machine)
    clips = forms.random_clips(settings.clips[0], settings.batches[0])
    with_s = _steady(machine, form, clips)
    staging = form.encoder._staging
    kept: list[torch.Tensor] = []

    class Kept:
        """Staging whose latents stay on the device."""

        overlaps = staging.overlaps
        upload = staticmethod(staging.upload)

        @staticmethod
        def download(latent_BCthw: torch.Tensor) -> Callable[[], np.ndarray]:
            kept[:] = [latent_BCthw]
            nothing = np.zeros((latent_BCthw.shape[0], 0), np.float32)
            return lambda: nothing

    form.encoder._staging = Kept()  # type: ignore[assignment]
    without_s = _steady(machine, form, clips)
    copy_s = min(machine.clock(lambda: staging.download(kept[0])()) for _ in range(REPEATS))
    return {"with_ms": 1e3 * with_s, "without_ms": 1e3 * without_s, "copy_alone_ms": 1e3 * copy_s}
