"""`BuildReport`: totals of a build, its timings and its rejects by reason, summed over shard results in any order."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.records import Counts, Timings

if TYPE_CHECKING:
    from pipeline.engine.worker.shard_result import ShardResult


REJECTING_SHOWN = 10


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
    failed: dict[str, str] = field(default_factory=dict)  # shard name -> reason it was given up
    refused: list[str] = field(
        default_factory=list
    )  # inputs of committed shards that could not be read, each with the error
    counts: Counts = field(default_factory=Counts)
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    warnings: dict[str, int] = field(default_factory=dict)  # see `Receipt.warnings`
    # Counts of this run's inputs: includes shards that other builds committed, and of a retry only what it adds.
    judged: Counts = field(default_factory=Counts)
    judged_rejects: dict[str, int] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    num_bytes: int = 0
    wall_s: float = 0.0
    startup_s: float = 0.0  # of the wall time, until the first encoder was up
    compile_s: float = 0.0  # of the wall time, in which an encoder compiled its network, on average
    encoders: int = 0
    encoder_s: float = 0.0  # seconds that encoders were up, summed
    stopped: str | None = None  # the limit that ended the build before all shards were done
    step_sizes: dict[str, int] = field(default_factory=dict)  # FxHxW of a chunk -> largest number of chunks in a step
    rejecting: list[str] = field(default_factory=list)  # ids of the first shards of this run with rejects
    notices: list[str] = field(default_factory=list)
    taken_down: int = 0  # inputs that are not encoded because a takedown names them
    passed_over: dict[str, Any] = field(default_factory=dict)  # objects in the inputs that are not encoded, by kind
    compiled: bool = False  # steps of the network run through torch.compile
    compile_reason: str = ""  # why, or why not

    @property
    def ok(self) -> bool:
        """Whether every shard has a receipt and every input could be read."""
        return not self.failed and not self.refused and self.shards_left == 0

    @property
    def shards_left(self) -> int:
        """Shards without a receipt, including those that were given up."""
        return self.shards_total - self.shards_before - self.shards_done - self.shards_elsewhere

    @property
    def frames_per_s(self) -> float:
        """Pixel frames written per second of encoding, after the start-up and without compiling."""
        working_s = self.wall_s - self.startup_s - self.compile_s
        return self.counts.frames / working_s if working_s > 0 else 0.0

    def add(self, result: ShardResult, *, ours: bool) -> None:
        """Adds a finished shard. Its clips count only if this build committed it (`ours`)."""
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
        if result.rejects and len(self.rejecting) < REJECTING_SHOWN:
            self.rejecting.append(result.shard_id)
        for shape, chunks in result.step_sizes.items():
            self.step_sizes[shape] = max(chunks, self.step_sizes.get(shape, 0))
        for reason, n in result.rejects.items():
            self.rejects[reason] = self.rejects.get(reason, 0) + n
        for warning, n in result.warnings.items():
            self.warnings[warning] = self.warnings.get(warning, 0) + n

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "ok": self.ok, "frames_per_s": round(self.frames_per_s, 2)}
