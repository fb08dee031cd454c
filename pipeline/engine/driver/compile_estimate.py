"""Estimate whether compiled steps pay for a new output: from its listed inputs, their rules, the network and the cores of its encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.encoder.compiling import compile_s, missing_compiler, packed_bytes, saved_core_s
from pipeline.units import quantity, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.records import ClipRules, ImageRules, Shard

# A wrong "on" costs a few minutes, a wrong "off" a quarter of a long build: rough numbers do.
PAYS = 2.0  # times the time of compiling that compiled steps must save
VIDEO_BYTES = 1 << 20  # of a video inside a tar
BYTES_A_SECOND, SOURCE_FPS = 500_000, 25.0  # of a video
MOST_PACKED_BYTES = (
    2 << 30
)  # of weights packed into compiled steps, in each encoder; beside its frames (`engine.frame_bytes`) and states
SIZES_OF_AREA = 8  # frame sizes that a corpus gives where they follow from the aspect ratios of its videos


@dataclass(frozen=True, slots=True)
class CompileChoice:
    """Whether steps are compiled, and why."""

    on: bool
    reason: str

    @property
    def line(self) -> str:
        """The choice for the user."""
        return f"compile: {self.word}, {self.reason}"

    @property
    def word(self) -> str:
        """On or off, as in a job file."""
        return "on" if self.on else "off"


def estimate(
    spec: Mapping[str, Any],
    rules: ClipRules,
    shards: Sequence[Shard],
    device: str,
    compute_dtype: str,
    cores: Callable[[], float],
) -> CompileChoice:
    """The choice of `auto` for a new output. Where it is "on", a compiler was found and not tried yet: no lasting choice may follow from a
    trial that fails for a reason that passes.

    Args:
        spec: of the network (`LatentSpec.to_dict`), which can be compiled.
        rules: of the clips.
        shards: the inputs as listed, not opened.
        device: of the encoders.
        compute_dtype: of the encoders.
        cores: gives the CPU cores of all encoders together; called only if the estimate needs them.
    """
    if device.startswith("cuda"):
        return CompileChoice(False, "its gain on GPUs is not known yet; set engine.compile=on to compile anyway")
    if spec["chunking"] == "none":
        return CompileChoice(
            False, "each length of its whole clips would be compiled; set engine.compile=on to compile anyway"
        )
    if (saved_core := saved_core_s(spec["network"])) is None:
        return CompileChoice(False, "its gain was not measured yet; set engine.compile=on to compile anyway")
    sizes, pixels = _frame_sizes(rules)
    frames = _frames(rules, shards)
    saved_s = saved_core * frames * pixels / 1e6 / max(1.0, cores())
    cost_s = compile_s(spec["network"]) * sizes
    much = f"about {frames:,.0f} frames of {quantity(sizes, 'size')}"
    if (packed := sizes * packed_bytes(spec["network"], compute_dtype)) > MOST_PACKED_BYTES:
        return CompileChoice(
            False,
            f"{much}: each size packs the encoder's weights twice, about {size(packed)} in each encoder; set "
            "engine.compile=on to compile anyway",
        )
    if saved_s < PAYS * cost_s:
        return CompileChoice(False, f"{much} are too few: it would take about {cost_s:.0f} s and save {saved_s:.0f} s")
    if (missing := missing_compiler(device, tried=False)) is not None:
        return CompileChoice(False, missing)
    return CompileChoice(True, f"{much}: it takes about {cost_s:.0f} s for each encoder and saves {saved_s:.0f} s")


def _frame_sizes(rules: ClipRules) -> tuple[int, float]:
    """Number of frame sizes, each of which is compiled, and the mean of their pixels."""
    kinds: list[ClipRules | ImageRules] = [rules] if rules.images is None else [rules, rules.images]
    areas = [kind.area for kind in kinds if kind.area is not None]
    sizes = {(bucket.height, bucket.width) for kind in kinds for bucket in kind.buckets}
    pixels = [height * width for height, width in sizes] + areas
    return len(sizes) + SIZES_OF_AREA * len(areas), sum(pixels) / len(pixels)


def _frames(rules: ClipRules, shards: Sequence[Shard]) -> float:
    """Frames to encode, roughly: of tars and of videos only the bytes are known before they are read."""
    num_bytes = sum(shard.num_bytes for shard in shards)
    videos = sum(len(shard.objects) if shard.kind == "files" else shard.num_bytes / VIDEO_BYTES for shard in shards)
    longest = max((bucket.frames for bucket in rules.buckets), default=max(rules.frame_counts))
    frames = num_bytes / BYTES_A_SECOND * (rules.fps or SOURCE_FPS)
    if rules.select in ("head", "uniform") and not rules.spans:
        frames = min(frames, videos * longest * max(1, rules.select_arg))
    return frames * len(rules.variants)
