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
    slots: int = 0  # chunks that these steps could have held
    encode_s: float = 0.0  # in the network, without compiling
    compile_s: float = 0.0  # compiling its steps; grows while one is being compiled
    # Seconds without a chunk to encode, by what was waited for.
    decode_wait_s: float = 0.0
    fetch_wait_s: float = 0.0
    upload_wait_s: float = 0.0  # all frames are encoded or held back: files are built, uploaded, committed
    idle_s: float = 0.0  # it holds no shard
    frames_decoded: int = 0  # frames that left the codec, of finished videos; not all are sampled
    decode_cpu_s: float = 0.0  # of decoders, for these frames
    bytes_in: int = 0  # received from storage by the encoder's process; decoders on other nodes fetch for themselves
    bytes_out: int = 0  # sent to storage
    storage_retries: int = 0  # requests repeated by this process, see `storage.retries`
    device_bytes: int = 0  # memory that this process holds on its GPU; 0 on a CPU
    video: str = ""  # key of the sample whose frames arrived last
    lanes_ready: int = 0
    progress: int = 0  # see `ProgressCounter`: it grows while anything moves
    bytes_done: dict[str, int] = field(
        default_factory=dict
    )  # shard id -> `ShardAttempt.bytes_done`, attempts in flight
