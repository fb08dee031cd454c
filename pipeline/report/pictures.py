"""Clips of a snapshot decoded beside their originals: quality of all, pictures of the worst, median, best and a few random ones.

Takes a store and the number of a snapshot. Gives `Decoded` and WebP pictures by name: `{id}-still` (first, middle, last frame; original
above, decoded below), `{id}-play` (the same clip, animated, original left), `channel-{n}` (one channel of one latent: its first position
left, one of the others right). Frames are reduced to `LARGEST` pixels as they come, so memory does not depend on clips.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.errors import NonFiniteLatent, StorageUnavailable, UsageError
from pipeline.format.codec import value_type
from pipeline.format.tensors import stored_values
from pipeline.look.originals import UNAVAILABLE, Originals
from pipeline.look.stored import choose, encoder_of, facts, in_turns, latent_bytes
from pipeline.report.values import Clip, Decoded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.config import StorageConfig
    from pipeline.look.showing import LatentDecoder, Picture
    from pipeline.look.stored import StoredClip
    from pipeline.storage import Store

FRAMES = 9  # of an animation
LARGEST = 256  # longer side of a frame in pixels
LARGEST_MAP = 64  # of a channel
EACH = 3  # clips shown of worst, median, best and random
MISSES = 4  # clips without a source that are passed over, for each clip asked for
PICTURE_BYTES = 3_500_000  # of all clips; base64 makes a third more of it
QUALITIES = (
    (LARGEST, 80),
    (LARGEST, 60),
    (192, 60),
    (128, 50),
    (96, 40),
)  # longer side, WebP quality; the first that fits
GAP = 4  # pixels between frames
CHANNEL_SPREAD = 3.0  # standard deviations to the strongest colour of a channel map
WITHOUT = "the page has no decoded pictures"


@dataclass(slots=True)
class Pictures:
    """WebP pictures by name."""

    by_name: dict[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(slots=True)
class MeasuredClip:
    """One decoded clip: its frames, uint8 `T H W 3`, and its latent."""

    clip: Clip
    original_THWC: np.ndarray | None = field(repr=False)
    decoded_THWC: np.ndarray = field(repr=False)
    latent_Cthw: np.ndarray = field(repr=False)


def decode_clips(
    store: Store, number: int, storage: StorageConfig, wanted: int, checkpoint: str | None, device: str
) -> tuple[Decoded, Pictures, list[str]]:
    """Decodes up to `wanted` clips of the network that committed last. Notices say what is missing: weights, sources, other networks.

    Raises:
        InputError: no clip, a latent or file that is not the one that was written.
        ConfigError: CUDA asked for where there is none, a clip that does not fit into the device's memory.
        CheckpointError, AccessError: the weights at `checkpoint` cannot be used. Without `checkpoint` this is a notice.
    """
    chosen = choose(store, number)

    from pipeline.look.showing import LatentDecoder

    empty = Decoded(None, (), 0, 0, (), {}, None)
    try:
        decoder = LatentDecoder(encoder_of(store, chosen.receipts, storage), checkpoint, device)
    except (UsageError, StorageUnavailable) as error:
        if checkpoint is not None or device not in ("auto", "cpu"):
            raise
        return empty, Pictures(), [f"{WITHOUT}, because its network cannot be loaded: {error.message}"]
    notices = list(decoder.notices)
    if chosen.other_networks:
        notices.append(f"pictures are of the newest of {chosen.other_networks + 1} networks in this snapshot")
    offered = in_turns(store, chosen.receipts)
    try:
        measured, without = _measure(store, offered, decoder, Originals(storage), wanted)
    except NonFiniteLatent as error:
        return empty, Pictures(), [*notices, f"{WITHOUT}: {error.message}"]
    if without:
        some = (
            ""
            if any(item.clip.psnr is not None for item in measured)
            else "; decoded pictures are shown without originals"
        )
        notices.append(f"the sources of {without} clips cannot be read any more or have changed{some}")
    if not measured:
        return empty, Pictures(), notices
    shown = chosen_clips(measured)
    pictures = Pictures()
    share = PICTURE_BYTES // len(shown)
    for item in shown.values():
        pictures.by_name.update(clip_pictures(item, share))
    middle = next((item for item in shown.values() if item.clip.shown == "median"), next(iter(shown.values())))
    lead = decoder.vae.spec.lead_frames
    pictures.by_name.update(_channel_pictures(middle.latent_Cthw, max(1, lead)))
    decoded = Decoded(
        network=decoder.facts(),
        clips=tuple(shown[item.clip.id].clip if item.clip.id in shown else item.clip for item in measured),
        without_original=without,
        lead_positions=lead,
        positions=_by_position([item.clip.frame_ssim for item in measured], lead, decoder.vae.spec.time_stride),
        channel_std=_channel_std(middle.latent_Cthw, max(1, lead)),
        channels_of=middle.clip.id,
    )
    return decoded, pictures, notices


def _measure(
    store: Store, offered: Iterator[StoredClip], decoder: LatentDecoder, originals: Originals, wanted: int
) -> tuple[list[MeasuredClip], int]:
    """Clips by PSNR, lowest first, and the number of clips whose source cannot be read. If that is all, clips without originals."""
    measured: list[MeasuredClip] = []
    passed: list[StoredClip] = []
    for clip in offered:
        if len(measured) == wanted or len(passed) == MISSES * wanted:
            break
        row = facts(store, clip)
        latent = latent_bytes(store, clip)
        try:
            with originals.open(clip, row) as frames:
                measured.append(_measured(clip, row, latent, decoder.show(clip, latent, frames, FRAMES)))
        except UNAVAILABLE:
            passed.append(clip)
    if not measured:
        for clip in passed[:wanted]:
            latent = latent_bytes(store, clip)
            measured.append(_measured(clip, facts(store, clip), latent, decoder.show(clip, latent, None, FRAMES)))
    measured.sort(key=lambda item: (item.clip.psnr or 0.0, item.clip.id))
    return measured, len(passed)


def _measured(clip: StoredClip, row: dict[str, Any], latent: bytes, picture: Picture) -> MeasuredClip:
    caption = row.get("caption")
    described = Clip(
        id=row["id"],
        key=row["source_key"][:300],
        source=row["source_uri"][:300],
        bucket=row["bucket"],
        variant=row["variant"],
        frames=row["num_frames"],
        fps=row["fps"],
        caption=caption[:300] if caption else None,
        psnr=picture.psnr,
        ssim=picture.ssim,
        frame_psnr=tuple(round(value, 3) for value in picture.frame_psnr),
        frame_ssim=tuple(round(value, 5) for value in picture.frame_ssim),
        shown=None,
    )
    original, decoded = (_frames(tensor) for tensor in (picture.original_CTHW, picture.decoded_CTHW))
    values_Cthw = stored_values(latent, value_type(clip.row.dtype), clip.row.shape).astype(np.float32)
    return MeasuredClip(described, None if picture.psnr is None else original, decoded, values_Cthw)


def _frames(video_CTHW: Any) -> np.ndarray:
    """Frames `T H W 3`, uint8, reduced to `LARGEST`."""
    frames_THWC = video_CTHW.permute(1, 2, 3, 0).contiguous().numpy()
    return np.stack([np.asarray(_reduced(Image.fromarray(frame), LARGEST)) for frame in frames_THWC])


def _reduced(picture: Image.Image, largest: int) -> Image.Image:
    scale = largest / max(picture.size)
    if scale >= 1:
        return picture
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def chosen_clips(measured: Sequence[MeasuredClip]) -> dict[str, MeasuredClip]:
    """Clips that are shown, by id, each once: worst, median and best of those with a PSNR, then others in the order of a hash."""
    rated = [item for item in measured if item.clip.psnr is not None]
    middle = max(0, (len(rated) - EACH) // 2)
    groups = {"worst": rated[:EACH], "median": rated[middle : middle + EACH], "best": rated[-EACH:]}
    found: dict[str, MeasuredClip] = {}
    for name in ("worst", "best", "median"):  # of a few clips, the ends matter more
        for item in groups[name]:
            if item.clip.id not in found:
                found[item.clip.id] = replace(item, clip=_named(item.clip, name))
    rest = [item for item in measured if item.clip.id not in found]
    rest.sort(key=lambda item: hashlib.blake2b(item.clip.id.encode()).hexdigest())
    for item in rest[: EACH if rated else 4 * EACH]:
        found[item.clip.id] = replace(item, clip=_named(item.clip, "random"))
    return found


def _named(clip: Clip, shown: str) -> Clip:
    return replace(clip, shown=shown, pictures={"still": f"{clip.id}-still", "play": f"{clip.id}-play"})


def clip_pictures(item: MeasuredClip, most: int) -> dict[str, bytes]:
    """The two pictures of a clip in at most `most` bytes, or as small as they get."""
    videos = [frames for frames in (item.original_THWC, item.decoded_THWC) if frames is not None]
    milliseconds = max(20, round(1000 * item.clip.frames / max(item.clip.fps, 0.1) / len(item.decoded_THWC)))
    made: dict[str, bytes] = {}
    for largest, quality in QUALITIES:
        reduced = [[_reduced(Image.fromarray(frame), largest) for frame in frames] for frames in videos]
        still = _grid([[frames[i] for i in _first_middle_last(len(frames))] for frames in reduced])
        pairs = [_grid([list(each)]) for each in zip(*reduced, strict=True)]
        made = {
            item.clip.pictures["still"]: _webp([still], quality, milliseconds),
            item.clip.pictures["play"]: _webp(pairs, quality, milliseconds),
        }
        if sum(map(len, made.values())) <= most:
            break
    return made


def _first_middle_last(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})


def _grid(rows: Sequence[Sequence[Image.Image]], gap: int = GAP) -> Image.Image:
    """Frames of one size, row by row."""
    width, height = rows[0][0].size
    whole = Image.new(
        "RGB", (max(map(len, rows)) * (width + gap) - gap, len(rows) * (height + gap) - gap), (128, 128, 128)
    )
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            whole.paste(frame, (x * (width + gap), y * (height + gap)))
    return whole


def _webp(frames: Sequence[Image.Image], quality: int, milliseconds: int) -> bytes:
    out = io.BytesIO()
    more = (
        {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0} if len(frames) > 1 else {}
    )
    frames[0].save(out, format="WEBP", quality=quality, method=4, **more)
    return out.getvalue()


def _by_position(by_frame: Sequence[Sequence[float]], lead: int, stride: int) -> tuple[float, ...]:
    """Mean of frame values by latent position: the first `lead` frames are positions of their own, then `stride` frames each."""
    found: dict[int, list[float]] = {}
    for values in by_frame:
        for frame, value in enumerate(values):
            position = frame if frame < lead else lead + (frame - lead) // stride
            found.setdefault(position, []).append(value)
    return tuple(round(float(np.mean(found[position])), 5) for position in sorted(found))


def _channel_std(latent_Cthw: np.ndarray, lead: int) -> dict[str, tuple[float, ...]]:
    """Standard deviation by channel of the positions of the first frame, and of the others."""
    parts = {"first": latent_Cthw[:, :lead], "others": latent_Cthw[:, lead:]}
    return {name: tuple(float(v) for v in part.std(axis=(1, 2, 3))) for name, part in parts.items() if part.shape[1]}


def _channel_pictures(latent_Cthw: np.ndarray, lead: int) -> dict[str, bytes]:
    """For each channel its first position and, right of it, the middle one of the others, on one scale of colours."""
    length = latent_Cthw.shape[1]
    positions = [0] if length <= lead else [0, lead + (length - lead) // 2]
    made = {}
    for channel, values_thw in enumerate(latent_Cthw):
        std = float(values_thw.std()) or 1.0
        scaled = np.clip((values_thw - values_thw.mean()) / (CHANNEL_SPREAD * std), -1, 1)
        made[f"channel-{channel}"] = _lossless(_grid([[_coloured(scaled[position]) for position in positions]], gap=1))
    return made


def _coloured(values_HW: np.ndarray) -> Image.Image:
    """-1 blue, 0 white, 1 orange; reduced to `LARGEST_MAP`."""
    low, middle, high = (np.array(rgb, np.float32) for rgb in ((33, 102, 172), (247, 247, 247), (179, 88, 6)))
    weight = np.abs(values_HW)[..., None]
    ends = np.where(values_HW[..., None] < 0, low, high)
    return _reduced(Image.fromarray((middle + (ends - middle) * weight).round().astype(np.uint8)), LARGEST_MAP)


def _lossless(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="WEBP", lossless=True, quality=50)
    return out.getvalue()
