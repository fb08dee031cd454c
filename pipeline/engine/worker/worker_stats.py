"""Live numbers of one worker, as its pulse reports them to the driver."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class WorkerStats:
    """Sums over all attempts of a worker since it started; seconds are of its encode loop. Sent every few seconds."""

    frames: int = 0
    clips: int = 0
    samples: int = 0
    steps: int = 0
    batched: int = 0  # chunks over all steps; divided by steps it is the mean batch
    encode_s: float = 0.0
    decode_wait_s: float = 0.0
    fetch_wait_s: float = 0.0
    lanes_ready: int = 0
    progress: int = 0  # see `ProgressCounter`: it grows while anything moves
    bytes_done: dict[str, int] = field(
        default_factory=dict
    )  # shard id -> `ShardAttempt.bytes_done`, attempts in flight
