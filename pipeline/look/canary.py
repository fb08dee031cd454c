"""Canary check of `lathe publish`: a few stored clips are cut from their sources and encoded again.

Takes receipts and their store, returns a `Check`. For each clip: chunked = whole, re-encoded = stored (bit for bit on a CPU of the kind
that made it, with as many threads, else within `TOLERANCE`, as for networks that were compiled), and PSNR and SSIM of what the stored
latent decodes to. Where log-variances and `i2v_cond` are stored, they are compared as the means are. On another machine int8 may be off by
half a step besides. Clips whose source is gone or has changed are counted; if that is so of all, the check is not judged.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoder.environment import environment
from pipeline.encoder.network import load_torch
from pipeline.format.codec import INT8, decoded, element_of, encoded, value_type
from pipeline.format.stored import I2V_COND
from pipeline.ledger.receipts import precedence
from pipeline.ledger.snapshots import Check
from pipeline.look.originals import UNAVAILABLE, Originals
from pipeline.look.showing import LatentDecoder
from pipeline.look.stored import cond_bytes, encoder_of, facts, in_turns, latent_bytes, logvar_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    import torch

    from pipeline.config import StorageConfig
    from pipeline.encoder import LatentSpec
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.look.stored import StoredClip
    from pipeline.storage import Store

    Moments = tuple[torch.Tensor, ...]
    """The mean and, where they are stored, the log-variance and the condition: float32 `C t h w` each."""

CHUNK_FRAMES = 16  # of a chunk, at most; a shorter clip is cut into two chunks or more all the same
WHOLE_FRAMES = 65  # a longer clip is encoded in one piece only up to here
MEAN, LOG_VARIANCE = "mean", "log-variance"
MISSES = 4  # clips without a source that are passed over, for each clip asked for
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""By compute type, on another machine: root mean square of the difference to the stored mean or log-variance, as a fraction of its own."""


@dataclass(slots=True)
class _Measured:
    """What was found on all clips so far."""

    clips: int = 0
    without_source: int = 0
    log_variances: int = 0  # clips of which they are stored
    conditions: int = 0  # as before, of `i2v_cond`
    chunked: int = 0  # clips encoded in several chunks and in one piece
    chunked_differs: list[str] = field(default_factory=list)  # ids
    bit_exact: int = 0
    same_machine: int = 0
    bits_differ: list[str] = field(default_factory=list)  # what of which ids, on the same kind of machine
    differences: list[float] = field(default_factory=list)  # the largest of what is compared, one a clip
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)


def canary_check(
    storage: StorageConfig,
    *,
    clips: int = 4,
    psnr_floor: float = 15.0,
    ssim_floor: float = 0.3,
    checkpoint: str | None = None,
    device: str = "auto",
) -> Callable[[Store, Sequence[CountedReceipt]], Check]:
    """The check as `operate.publish` takes it.

    Args:
        storage: how to reach the sources.
        clips: how many to encode again.
        psnr_floor: lowest mean PSNR of the clips in dB; not applied to untrained weights.
        ssim_floor: lowest mean SSIM of the clips, as `psnr_floor`.
        checkpoint: where the weights are now, instead of the URI the data files name.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    def check(store: Store, parts: Sequence[CountedReceipt]) -> Check:
        parts = [part for part in parts if part.receipt.files and not part.superseded]
        if not parts:
            return Check("canary", True, "no receipt with clips", {"clips": 0}, judged=False)
        newest = max((part.receipt for part in parts), key=precedence)
        same = [part for part in parts if part.receipt.fingerprint == newest.fingerprint]
        compute_dtype = newest.fingerprint_parts["compute_dtype"]
        decoder = LatentDecoder(encoder_of(store, same, storage), checkpoint, device, compute_dtype)
        found = _measure(store, same, decoder, Originals(storage), clips)
        return _judge(found, TOLERANCE[compute_dtype], psnr_floor, ssim_floor, trained=not decoder.vae.untrained)

    return check


def _measure(
    store: Store, parts: Sequence[CountedReceipt], decoder: LatentDecoder, originals: Originals, wanted: int
) -> _Measured:
    found = _Measured()
    for clip in in_turns(store, parts):
        if found.clips == wanted or found.without_source == MISSES * wanted:
            break
        row, latent = facts(store, clip), latent_bytes(store, clip)
        others = {LOG_VARIANCE: logvar_bytes(store, clip), I2V_COND: cond_bytes(store, clip)}
        stored = {MEAN: latent} | {name: data for name, data in others.items() if data is not None}
        try:
            with originals.open(clip, row) as frames, _threads_of(clip):
                again, differs = _encode_again(decoder, frames, clip.row.num_frames, stored)
            with originals.open(clip, row) as frames:
                picture = decoder.show(clip, latent, frames)
        except UNAVAILABLE:
            found.without_source += 1
            continue
        found.clips += 1
        found.chunked += differs is not None
        found.chunked_differs += [clip.row.id] if differs else []
        found.psnr += [] if picture.psnr is None else [picture.psnr]
        found.ssim += [] if picture.ssim is None else [picture.ssim]
        found.log_variances += LOG_VARIANCE in stored
        found.conditions += I2V_COND in stored
        _compare(found, clip, stored, again, decoder)
    return found


def _encode_again(
    decoder: LatentDecoder, frames: Any, num_frames: int, names: Collection[str]
) -> tuple[Moments, bool | None]:
    """A clip encoded in chunks, and whether its beginning encoded in one piece differs from that; None if it is one chunk. `names`: of what
    is encoded.
    """
    vae, torch = decoder.vae, load_torch()
    moments = LOG_VARIANCE in names

    def encode(planes_T3HW: np.ndarray, states: Any) -> tuple[Moments, Any]:
        planes_1T3HW = torch.from_numpy(planes_T3HW)[None]
        state, of_condition = states
        with torch.inference_mode():
            posterior, state = vae.encode_planes(planes_1T3HW, [frames.matrix], state, moments=moments)
            tensors = [posterior.mean, *([posterior.logvar] if moments else [])]
            if I2V_COND in names:
                condition, of_condition = vae.encode_condition(planes_1T3HW, [frames.matrix], of_condition)
                tensors.append(condition.mean)
        return tuple(tensor[0].float().cpu() for tensor in tensors), (state, of_condition)

    parts: list[Moments] = []
    head: list[np.ndarray] = []
    states = (None, None)
    for planes_T3HW in _chunks(frames, num_frames, _chunk_frames(vae.spec, num_frames), vae.spec.lead_frames):
        part, states = encode(planes_T3HW, states)
        parts.append(part)
        if sum(len(planes) for planes in head) + len(planes_T3HW) <= WHOLE_FRAMES:
            head.append(planes_T3HW)
    chunked = tuple(torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
    if len(head) < 2:
        return chunked, None
    whole, _ = encode(np.concatenate(head), (None, None))
    pairs = [(one, other[:, : one.shape[1]]) for one, other in zip(whole, chunked, strict=True)]
    if vae.spec.chunking == "exact" and vae.device.type == "cpu":
        return chunked, not all(torch.equal(one, other) for one, other in pairs)
    tolerance = TOLERANCE[str(vae.dtype).removeprefix("torch.")]
    return chunked, not all(_distance(one, other) <= tolerance for one, other in pairs)


def _chunk_frames(spec: LatentSpec, num_frames: int) -> int:
    """Frames of a chunk in addition to the lead frames of the first: half of the clip at most, if the network takes chunks."""
    if spec.chunking == "none":
        return num_frames
    groups = (num_frames - spec.lead_frames) // spec.time_stride
    return spec.time_stride * max(1, min(CHUNK_FRAMES // spec.time_stride, groups // 2))


def _chunks(frames: Any, num_frames: int, step: int, lead: int) -> Iterator[np.ndarray]:
    """Planes of a clip, `lead + step` frames first, then `step` at a time."""
    left, count = num_frames, lead + step
    while left > 0:
        yield frames.take(min(count, left))
        left, count = left - count, step


def _compare(
    found: _Measured, clip: StoredClip, stored: dict[str, bytes], again: Moments, decoder: LatentDecoder
) -> None:
    torch = load_torch()
    dtype = getattr(torch, value_type(clip.row.dtype))
    of_int8 = element_of(clip.row.dtype) == INT8
    distances, names = [], []  # names of what has other bits
    for (name, data), again_Cthw in zip(stored.items(), again, strict=True):
        stored_Cthw = torch.frombuffer(bytearray(data), dtype=dtype).reshape(clip.row.shape)
        rounded_Cthw = _as_int8(again_Cthw) if of_int8 else again_Cthw.to(dtype)
        if rounded_Cthw.shape != stored_Cthw.shape or not torch.equal(rounded_Cthw, stored_Cthw):
            names.append(name)
            if of_int8 and rounded_Cthw.shape == stored_Cthw.shape:
                rounded_Cthw = _within_half_a_step(again_Cthw, stored_Cthw)
            distances.append(_distance(rounded_Cthw.float(), stored_Cthw.float()))
    found.bit_exact += not names
    found.differences.append(float(np.max(distances, initial=0.0)))
    # This check compiles nothing: it would take longer than the clips, and need a compiler.
    if clip.receipt.fingerprint_parts.get("encoder", {}).get("compiled", False):
        return
    if decoder.vae.device.type == "cpu" and _made_here(clip):
        found.same_machine += 1
        if names and decoder.vae.spec.chunking == "exact":
            found.bits_differ.append(f"the {' and '.join(names)} of {clip.row.id}")


def _made_here(clip: StoredClip) -> bool:
    """Whether a machine of this kind made it on its CPU, with a recorded number of threads."""
    made_on = clip.receipt.notes.get("environment", {})
    threads = made_on.get("threads")
    return bool(made_on.get("cpu") and threads) and made_on == {**environment("cpu"), "threads": threads}


@contextmanager
def _threads_of(clip: StoredClip) -> Iterator[None]:
    """Within: as many threads of arithmetic as made the clip, if that was on such a machine. Another number sums in another order."""
    torch = load_torch()
    before = torch.get_num_threads()
    if _made_here(clip):
        torch.set_num_threads(int(clip.receipt.notes["environment"]["threads"]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _as_int8(values_Cthw: torch.Tensor) -> torch.Tensor:
    """What readers get of values that are stored as int8."""
    stored = encoded(values_Cthw.numpy(), INT8)
    return load_torch().from_numpy(decoded(stored.data, INT8, values_Cthw.shape))


def _within_half_a_step(again_Cthw: torch.Tensor, stored_Cthw: torch.Tensor) -> torch.Tensor:
    """The values nearest to `stored` that are at most half a step of int8 from `again`: what is left is not due to quantisation."""
    stored = stored_Cthw.float()
    step_C111 = (stored.amax((1, 2, 3), keepdim=True) - stored.amin((1, 2, 3), keepdim=True)) / 255
    slack = 0.505 * step_C111 + stored.abs() * 2.0**-10  # and the rounding to float16
    return stored.clamp(again_Cthw - slack, again_Cthw + slack)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference, as a fraction of that of `other`; 1 for other shapes."""
    if one.shape != other.shape:
        return 1.0
    size = float(other.double().square().mean().sqrt())
    return float((one.double() - other.double()).square().mean().sqrt()) / max(size, 1e-12)


def _judge(found: _Measured, tolerance: float, psnr_floor: float, ssim_floor: float, *, trained: bool) -> Check:
    largest = float(np.max(found.differences, initial=0.0))  # NaN stays NaN, and no comparison below lets it pass
    psnr, ssim = (float(np.mean(values)) if values else None for values in (found.psnr, found.ssim))
    numbers = {
        "clips": found.clips,
        "without_source": found.without_source,
        "log_variances": found.log_variances,
        "conditions": found.conditions,
        "chunked": found.chunked,
        "chunked_differs": len(found.chunked_differs),
        "same_machine": found.same_machine,
        "bit_exact": found.bit_exact,
        "largest_difference": largest,
        "tolerance": tolerance,
        "psnr": psnr if psnr is not None and np.isfinite(psnr) else None,  # the record is JSON
        "psnr_floor": psnr_floor if trained else None,
        "ssim": ssim if ssim is not None and np.isfinite(ssim) else None,
        "ssim_floor": ssim_floor if trained else None,
    }
    if not found.clips:
        return Check("canary", True, "no source of the clips looked at can be read any more", numbers, judged=False)
    wrong = []
    if found.chunked_differs:
        wrong.append(
            f"{len(found.chunked_differs)} of {found.chunked} clips encode to other latents in chunks than whole, "
            f"such as {found.chunked_differs[0]}"
        )
    if found.bits_differ:
        wrong.append(
            f"{len(found.bits_differ)} of {found.clips} clips, encoded again on a machine of the kind that made them, "
            f"differ from what is stored, such as {found.bits_differ[0]} (by up to {largest:.2g} of the latent)"
        )
    elif not largest <= tolerance:
        wrong.append(
            f"encoded again, latents differ by up to {largest:.2g} of their size from what is stored, allowed is {tolerance:g}"
        )
    if trained and psnr is not None and not psnr >= psnr_floor:
        wrong.append(f"stored latents decode to {psnr:.2f} dB PSNR on average, expected at least {psnr_floor:g} dB")
    if trained and ssim is not None and not ssim >= ssim_floor:
        wrong.append(f"stored latents decode to {ssim:.3f} SSIM on average, expected at least {ssim_floor:g}")
    return Check("canary", not wrong, "; ".join(wrong), numbers)
