"""Report of a night: its outcome, what changed, what was rejected and why, what it cost. JSON-ready; stored in the output."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import (
    BudgetSpent,
    GateFailed,
    Interrupted,
    LatheError,
    LeaseHeld,
    LeaseLost,
    StorageUnavailable,
    UsageError,
)
from pipeline.format.layout import night_report_key

if TYPE_CHECKING:
    from pipeline.engine.driver.report import BuildReport
    from pipeline.operate.publish import Published
    from pipeline.storage import Store

Outcome = Literal[
    "done", "nothing", "failed", "refused", "budget", "gate_failed", "lease_held", "lease_lost", "interrupted"
]
EXIT_CODES: dict[Outcome, int] = {
    "done": 0,
    "nothing": 0,
    "failed": 1,
    "refused": 2,
    "budget": 3,
    "gate_failed": 4,
    "lease_held": 5,
    "lease_lost": 5,
    "interrupted": 130,
}


@dataclass(frozen=True, slots=True)
class RejectedInput:
    """One sample or clip that was not encoded. `key`: None for damage that belongs to no known sample."""

    uri: str | None
    key: str | None
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What a night used, in seconds. `gpu_s`: encoders on GPUs were up. `core_s`: CPU time of decoders, and of CPU encoders' networks."""

    wall_s: float = 0.0
    gpu_s: float = 0.0
    core_s: float = 0.0


@dataclass(slots=True)
class Night:
    """See the module. `snapshot`: number of the snapshot that was published or covers everything already; `changes`: as in its record,
    against its parent.
    """

    night: str
    output: str
    started: str  # UTC, ISO 8601
    outcome: Outcome = "failed"
    message: str = ""  # why it is not "done"
    ended: str = ""
    fingerprint: str = ""
    inputs_listed: int = 0
    shards_todo: int = 0
    shards_done: int = 0
    shards_left: int = 0  # not started, or given up
    counts: dict[str, int] = field(
        default_factory=dict
    )  # of the shards of this night: samples, encoded, clips, frames, …
    bytes_written: int = 0
    published: bool = False
    snapshot: int | None = None
    page: str | None = None  # URI of the page on the snapshot, if one was made
    changes: dict[str, int] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    rejected: list[RejectedInput] = field(default_factory=list)  # the first of them
    failed: dict[str, str] = field(default_factory=dict)  # shards that were given up, with the reason
    cost: Cost = Cost()
    lease: dict[str, Any] | None = None  # of the run that holds the lease, if this one did not get it
    notices: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return EXIT_CODES[self.outcome]

    def add_build(self, report: BuildReport) -> None:
        """Takes the numbers of the build. Its notices were shown already."""
        timings = report.timings
        on_gpu = report.device.startswith("cuda")
        self.fingerprint = report.fingerprint
        self.shards_done = report.shards_done + report.shards_elsewhere
        self.shards_left = report.shards_left
        self.counts = {name: n for name, n in asdict(report.counts).items() if n}
        self.bytes_written = report.num_bytes
        self.rejects = dict(report.rejects)
        self.failed = {**report.failed, **{text: "could not be read" for text in report.refused}}
        self.cost = Cost(
            gpu_s=round(report.encoder_s, 3) if on_gpu else 0.0,
            core_s=round(timings.decode_cpu_s + (0.0 if on_gpu else timings.encode_s), 3),
        )

    def add_published(self, published: Published) -> None:
        """Takes what was published."""
        snapshot = published.snapshot
        self.published, self.snapshot = published.made, snapshot.number
        if published.made:
            self.changes = dict(snapshot.changes)
            self.checks = [asdict(check) for check in snapshot.checks]
        self.notices += published.notices

    def end(self, error: BaseException | None, began: float) -> None:
        """Sets outcome, message and times. `began`: time.monotonic() of the start."""
        self.ended = _now()
        self.cost = Cost(round(time.monotonic() - began, 3), self.cost.gpu_s, self.cost.core_s)
        if error is None:
            self.outcome = "done" if self.published or self.shards_done else "nothing"
            return
        self.outcome = self._outcome_of(error)
        self.message = str(error) if isinstance(error, LatheError) else type(error).__name__
        if isinstance(error, LeaseHeld):
            self.lease = error.record
        if isinstance(error, GateFailed):
            self.checks = [asdict(check) for check in error.checks]

    def _outcome_of(self, error: BaseException) -> Outcome:
        kinds: tuple[tuple[type[BaseException], Outcome], ...] = (
            (BudgetSpent, "budget"),
            (GateFailed, "gate_failed"),
            (LeaseHeld, "lease_held"),
            (LeaseLost, "lease_lost"),
            (Interrupted, "interrupted"),
            (KeyboardInterrupt, "interrupted"),
        )
        for kind, outcome in kinds:
            if isinstance(error, kind):
                return outcome
        away = isinstance(
            error.__cause__, StorageUnavailable
        )  # a store that was away when it was asked for the first time
        return "refused" if isinstance(error, UsageError) and not (self.shards_done or away) else "failed"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "exit_code": self.exit_code}

    def store(self, store: Store) -> None:
        """Writes the report into the output."""
        store.write(night_report_key(self.night), json.dumps(self.to_dict(), indent=1, default=str).encode())


def new_night(output: str) -> Night:
    """The empty report of a night that begins now."""
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
    return Night(name, output, _now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
