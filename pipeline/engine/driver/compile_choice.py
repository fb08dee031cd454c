"""Whether a build compiles its network (`engine.compile`): what the output recorded, what the job asks for, or an estimate.

A compiled network gives other bits, so the choice is part of the fingerprint, and an output must not mix both. The first build that encodes
records its choice there, `_compile/{fingerprint}.json`, created only if absent, and later builds follow it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.encoder.compiling import COMPILE_S, missing_compiler, saved_core_s, why_never_compiled
from pipeline.errors import ConfigError, NotFound, OutputError
from pipeline.format.layout import compile_key
from pipeline.units import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.records import ClipRules, ImageRules, Shard
    from pipeline.storage import Store

# Of the estimate. A wrong "on" costs a few minutes, a wrong "off" a quarter of a long build: rough numbers do.
PAYS = 2.0  # times the time of compiling that compiled steps must save
VIDEO_BYTES = 1 << 20  # of a video inside a tar
BYTES_A_SECOND, SOURCE_FPS = 500_000, 25.0  # of a video
MOST_SIZES = (
    8  # each compiled step packs a copy of the encoder's weights, 46 to 407 MB in float32, and a size needs two
)
SIZES_OF_AREA = 8  # frame sizes that a corpus gives where they follow from the aspect ratios of its videos


@dataclass(frozen=True, slots=True)
class CompileChoice:
    """Whether steps are compiled, and why."""

    on: bool
    reason: str

    @property
    def line(self) -> str:
        """The choice for the user."""
        return f"compile: {_word(self.on)}, {self.reason}"


def choose_compile(
    plain: BuildContext,
    store: Store,
    fingerprints: Collection[str],
    shards: Sequence[Shard],
    cores: Callable[[], float],
    *,
    encodes_here: bool = True,
) -> CompileChoice:
    """The choice of a build, which is recorded in the output if that has none.

    Args:
        plain: context of the build without compiling.
        store: the output.
        fingerprints: of its receipts.
        shards: the inputs as listed.
        cores: gives the CPU cores of all encoders together; called only if the estimate needs them.
        encodes_here: whether encoders run on this machine. Those of a cluster look for a compiler themselves (`prepare_compiler`).

    Raises:
        ConfigError: the job asks for what the output, the network or this machine does not allow.
    """
    asked, network = plain.job.engine.compile, plain.spec["network"]
    if (never := why_never_compiled(network)) is not None:
        if asked == "on":
            raise ConfigError(f"engine.compile: got on, and {never}; use auto or off")
        return CompileChoice(False, never)
    recorded = _recorded(plain, store, fingerprints)
    if recorded is None:
        choice = CompileChoice(asked == "on", f"engine.compile={asked}")
        if asked == "auto":
            choice = _estimated(plain, store, shards, cores)
        elif choice.on and encodes_here:
            _need_compiler(plain.device, "")
        if _record(plain, store, choice):
            return choice
        recorded = not choice.on  # another build was first
    if asked != "auto" and (asked == "on") != recorded:
        raise ConfigError(
            f"engine.compile: {asked} was asked for, and the latents of {store.root} with otherwise equal settings are made with "
            f"{_word(recorded)}; the two differ in bits. Leave engine.compile at auto to go on, or choose another output"
        )
    reason = "as the latents of this output"
    if recorded and encodes_here:
        _need_compiler(plain.device, f"; {store.root} holds latents of a compiled network")
    if not recorded and asked == "auto" and (new := _estimated(plain, store, shards, cores)).on:
        reason += f"; another output would be compiled, {new.reason}"
    return CompileChoice(recorded, reason)


def _need_compiler(device: str, more: str) -> None:
    if (missing := missing_compiler(device)) is not None:
        raise ConfigError(f"engine.compile: {missing}{more}")


# --- record -----------------------------------------------------------------------------------------------------------


def _record(plain: BuildContext, store: Store, choice: CompileChoice) -> bool:
    """Records the choice unless the output has one. Returns whether it is the one that counts."""
    key = compile_key(plain.fingerprint)
    made = {
        "format": "latentset-compile",
        "compile": choice.on,
        "reason": choice.reason,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.put_if_absent(key, json.dumps(made, indent=1).encode())
    return _read(store, key) is choice.on  # read back: some stores do not decide a race


def _recorded(plain: BuildContext, store: Store, fingerprints: Collection[str]) -> bool | None:
    """The output's choice. Latents tell as well: those of older versions of Lathe, and of an output whose record was lost."""
    found = _read(store, compile_key(plain.fingerprint))
    if found is None and plain.fingerprint in fingerprints:
        return False
    if found is None and plain.as_compiled().fingerprint in fingerprints:
        return True
    return found


def _read(store: Store, key: str) -> bool | None:
    try:
        data = store.read(key)
    except NotFound:
        return None
    try:
        found = json.loads(data)["compile"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, bool):
        raise OutputError(
            f"{key} is not a record of engine.compile: expected JSON with compile true or false, got {data[:80]!r}; delete it, receipts "
            "tell as well",
            uri=store.uri(key),
        )
    return found


# --- estimate ---------------------------------------------------------------------------------------------------------


def _estimated(plain: BuildContext, store: Store, shards: Sequence[Shard], cores: Callable[[], float]) -> CompileChoice:
    """The choice for a new output, from its listed inputs."""
    if plain.device.startswith("cuda"):
        return CompileChoice(False, "its gain on GPUs is not known yet; engine.compile=on compiles all the same")
    if not store.conditional_writes():
        return CompileChoice(False, "the store has no conditional writes, so that builds at once could not agree")
    if plain.spec["chunking"] == "none":
        return CompileChoice(
            False, "each length of its whole clips would be compiled; engine.compile=on compiles all the same"
        )
    sizes, pixels = _frame_sizes(plain.rules)
    frames = _frames(plain.rules, shards)
    saved_s = saved_core_s(plain.spec["network"]) * frames * pixels / 1e6 / max(1.0, cores())
    cost_s = COMPILE_S * sizes
    much = f"about {frames:,.0f} frames of {quantity(sizes, 'size')}"
    if sizes > MOST_SIZES:
        return CompileChoice(
            False,
            f"{much}: each size holds two copies of the encoder's weights; engine.compile=on compiles all the same",
        )
    if saved_s < PAYS * cost_s:
        return CompileChoice(False, f"{much} are too few: it would take about {cost_s:.0f} s and save {saved_s:.0f} s")
    if (missing := missing_compiler(plain.device)) is not None:
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


def _word(on: bool) -> str:
    return "on" if on else "off"
