"""What a build amounts to: `BuildReport`, and how it reads.

Enters: shard results, in any order. Leaves: totals, where the time went, rejects by reason, as an object, as JSON, as text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.records import Counts, Timings
from pipeline.wording import EXPLAINED, size, warning_lines

if TYPE_CHECKING:
    from pipeline.engine.shard_result import ShardResult


FAILURES_SHOWN = 10
SHAPES_SHOWN = 6  # whole clips come in as many shapes as lengths


@dataclass(slots=True)
class BuildReport:
    """Result of `pipeline.encode`. Counts are of this run; shards that were done before are only counted as such."""

    output: str
    fingerprint: str
    network: str
    untrained: bool
    device: str
    shards_total: int
    shards_before: int  # done by earlier runs
    shards_done: int = 0  # committed by this run
    shards_elsewhere: int = 0  # committed by another build while this one worked on them
    failed: dict[str, str] = field(default_factory=dict)  # shard name -> why it was given up
    refused: list[str] = field(default_factory=list)  # inputs of committed shards that could not be read, each with why
    counts: Counts = field(default_factory=Counts)
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    warnings: dict[str, int] = field(default_factory=dict)  # see `Receipt.warnings`
    # What the inputs of this run gave: shards of other builds count here too, and a retry only with what it adds.
    judged: Counts = field(default_factory=Counts)
    judged_rejects: dict[str, int] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    num_bytes: int = 0
    wall_s: float = 0.0
    startup_s: float = 0.0  # of the wall time, until the first encoder was up
    encoders: int = 0
    step_sizes: dict[str, int] = field(
        default_factory=dict
    )  # FxHxW of a chunk -> most chunks a step of the network held
    notices: list[str] = field(default_factory=list)
    passed_over: dict[str, Any] = field(default_factory=dict)  # what the inputs hold and is not encoded, by kind

    @property
    def ok(self) -> bool:
        """Every shard has a receipt, and no input of one was refused."""
        return not self.failed and not self.refused and self.shards_left == 0

    @property
    def shards_left(self) -> int:
        """Shards without a receipt, those that were given up among them."""
        return self.shards_total - self.shards_before - self.shards_done - self.shards_elsewhere

    @property
    def frames_per_s(self) -> float:
        """Pixel frames written per second of encoding, after the start-up."""
        working_s = self.wall_s - self.startup_s
        return self.counts.frames / working_s if working_s > 0 else 0.0

    def add(self, result: ShardResult, *, ours: bool) -> None:
        """Counts a finished shard: what it holds if this build committed it, else only that another build did."""
        self.timings += result.timings
        self.refused += result.refused
        self.judged += result.added
        for reason, n in result.rejects.items():
            self.judged_rejects[reason] = self.judged_rejects.get(reason, 0) + n
        if not ours:
            self.shards_elsewhere += 1
            return
        self.shards_done += 1
        self.counts += result.counts
        self.num_bytes += result.num_bytes
        for shape, chunks in result.step_sizes.items():
            self.step_sizes[shape] = max(chunks, self.step_sizes.get(shape, 0))
        for reason, n in result.rejects.items():
            self.rejects[reason] = self.rejects.get(reason, 0) + n
        for warning, n in result.warnings.items():
            self.warnings[warning] = self.warnings.get(warning, 0) + n

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "ok": self.ok, "frames_per_s": round(self.frames_per_s, 2)}

    def lines(self) -> list[str]:
        """The summary a person reads at the end."""
        counts = self.counts
        startup = f", {self.startup_s:.1f} s of it to start" if self.shards_done else ""
        before = f", {self.shards_before} were done before" if self.shards_before else ""
        lines = [
            f"{self.shards_done} of {self.shards_total} shards encoded in {self.wall_s:.1f} s{startup}{before}",
            f"  samples   {counts.samples} in = {counts.encoded} encoded + {counts.rejected} rejected",
            f"  clips     {counts.clips} written + {counts.clips_rejected} rejected, {counts.frames} frames, "
            f"{self.frames_per_s:.1f} frames/s, {size(self.num_bytes)}",
        ]
        if self.shards_elsewhere:
            total = self.shards_total
            lines.append(f"  {self.shards_elsewhere} of {total} shards were committed by another build meanwhile")
        if self.shards_done:
            lines.append(f"  time      {self._where()}")
        if self.step_sizes:
            shapes = sorted(self.step_sizes.items(), key=lambda item: (-item[1], item[0]))
            more = f" and {len(shapes) - SHAPES_SHOWN} more shapes" if len(shapes) > SHAPES_SHOWN else ""
            lines.append("  steps     " + ", ".join(f"{n} x {shape}" for shape, n in shapes[:SHAPES_SHOWN]) + more)
        if self.rejects:
            reasons = sorted(self.rejects.items(), key=lambda item: (-item[1], item[0]))
            lines.append(f"  rejects   {', '.join(f'{reason} {n}' for reason, n in reasons)} ({EXPLAINED})")
        if self.passed_over:
            lines.append(f"  {self.passed_over['line']}")
        lines += warning_lines(self.warnings)
        lines += self._failures()
        if self.untrained:
            lines.append("  UNTRAINED random weights: these latents mean nothing and are marked so in the data")
        lines.append(f"  output    {self.output}  ({self.network}, fingerprint {self.fingerprint[:8]})")
        return lines

    def _failures(self) -> list[str]:
        failures = [*(f"{name}: {why}" for name, why in sorted(self.failed.items())), *self.refused]
        lines = [f"  failed    {text}" for text in failures[:FAILURES_SHOWN]]
        if len(failures) > FAILURES_SHOWN:
            lines.append(f"  failed    … and {len(failures) - FAILURES_SHOWN} more")
        return lines

    def _where(self) -> str:
        timings = self.timings
        parts = {
            "fetch": timings.fetch_s,
            "decode wait": timings.decode_wait_s,
            "encode": timings.encode_s,
            "write": timings.write_s,
        }
        whole = max((self.wall_s - self.startup_s) * max(1, self.encoders), 1e-9)
        shares = ", ".join(f"{name} {seconds:.1f} s ({seconds / whole:.0%})" for name, seconds in parts.items())
        return f"{shares} of encoder time; write runs beside the others; decoders worked {timings.decode_cpu_s:.1f} s"
