"""Prometheus series of a build, recorded with `ray.util.metrics`: by each encoder actor for itself, by the driver for the build.

Takes counters that only grow (`WorkerStats`, numbers of the driver) and records their differences. Labels are bounded: a cause, a reason,
an outcome; never the name of a shard or a video. Ray adds labels (`SessionName`, `NodeAddress`, `WorkerId`) and the prefix `ray_`.
`SERIES` is what deploy/grafana/lathe.json may draw and docs/monitoring.md lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ray.util.metrics import Counter, Gauge

from pipeline.engine.worker.worker_stats import WorkerStats

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Series:
    """One series. `name` without Ray's prefix; its unit is in its name, as Prometheus wants it."""

    name: str
    kind: Literal["counter", "gauge"]
    about: str
    source: Literal["encoder", "driver", "both"]
    label: str | None = None

    @property
    def exported(self) -> str:
        """The name in a scrape."""
        return f"ray_{self.name}"


SERIES = (
    Series("lathe_frames_encoded_total", "counter", "Frames of clips that went through the network.", "encoder"),
    Series("lathe_frames_decoded_total", "counter", "Frames that left a codec, also those not sampled.", "encoder"),
    Series("lathe_decode_cpu_seconds_total", "counter", "CPU time of decoders for these frames.", "encoder"),
    Series("lathe_clips_encoded_total", "counter", "Clips that went through the network.", "encoder"),
    Series("lathe_samples_total", "counter", "Videos that were finished or rejected.", "encoder"),
    Series("lathe_received_bytes_total", "counter", "Bytes received from storage by encoders.", "encoder"),
    Series("lathe_sent_bytes_total", "counter", "Bytes of files sent to storage.", "encoder"),
    Series("lathe_encode_seconds_total", "counter", "Time in the network.", "encoder"),
    Series("lathe_compile_seconds_total", "counter", "Time in which steps of the network were compiled.", "encoder"),
    Series(
        "lathe_starved_seconds_total",
        "counter",
        "Time without a chunk to encode: waiting for decoders, for fetches, for uploads and the commit, or without a shard.",
        "encoder",
        "cause",
    ),
    Series("lathe_encode_steps_total", "counter", "Steps of the network.", "encoder"),
    Series("lathe_encode_chunks_total", "counter", "Chunks in these steps.", "encoder"),
    Series("lathe_encode_slots_total", "counter", "Chunks that these steps could have held.", "encoder"),
    Series("lathe_storage_retries_total", "counter", "Requests to storage that were repeated.", "both"),
    Series("lathe_decoders_ready", "gauge", "Decoders that are up.", "encoder"),
    Series("lathe_device_memory_bytes", "gauge", "GPU memory reserved by the encoder.", "encoder"),
    Series(
        "lathe_shards_total",
        "counter",
        "Shards by outcome: done, elsewhere, retried, handed_back, abandoned.",
        "driver",
        "outcome",
    ),
    Series("lathe_committed_bytes_total", "counter", "Bytes of files with a receipt of this build.", "driver"),
    Series("lathe_rejects_total", "counter", "Rejected samples and clips of finished shards.", "driver", "reason"),
    Series(
        "lathe_workers_lost_total", "counter", "Encoders that were lost, by cause; preempted is one.", "driver", "cause"
    ),
    Series("lathe_outage_seconds_total", "counter", "Time in which the build waited for storage.", "driver"),
    Series("lathe_encoders", "gauge", "Encoders that are up.", "driver"),
    Series("lathe_shards_open", "gauge", "Shards that are neither done nor given up.", "driver"),
    Series("lathe_open_bytes", "gauge", "Bytes of their sources, without what is done inside running ones.", "driver"),
)
OF_WORKER = {
    "lathe_frames_encoded_total": "frames",
    "lathe_frames_decoded_total": "frames_decoded",
    "lathe_decode_cpu_seconds_total": "decode_cpu_s",
    "lathe_clips_encoded_total": "clips",
    "lathe_samples_total": "samples",
    "lathe_received_bytes_total": "bytes_in",
    "lathe_sent_bytes_total": "bytes_out",
    "lathe_encode_seconds_total": "encode_s",
    "lathe_compile_seconds_total": "compile_s",
    "lathe_encode_steps_total": "steps",
    "lathe_encode_chunks_total": "batched",
    "lathe_encode_slots_total": "slots",
    "lathe_storage_retries_total": "storage_retries",
    "lathe_decoders_ready": "lanes_ready",
    "lathe_device_memory_bytes": "device_bytes",
}
"""Fields of `WorkerStats` by series."""
STARVED = {"decode": "decode_wait_s", "fetch": "fetch_wait_s", "upload": "upload_wait_s", "shard": "idle_s"}
"""Fields of `WorkerStats` by cause of `lathe_starved_seconds_total`."""

Values = dict[tuple[str, str], float]
"""(series, value of its label or ""): the number now."""


class Meters:
    """Exporter of the series of one process. One thread at a time uses it."""

    def __init__(self, source: Literal["encoder", "driver"]) -> None:
        mine = [series for series in SERIES if series.source in (source, "both")]
        self._labels = {series.name: series.label for series in mine}
        self._counters = {
            item.name: Counter(item.name, item.about, (item.label,) if item.label else ())
            for item in mine
            if item.kind == "counter"
        }
        self._gauges = {item.name: Gauge(item.name, item.about) for item in mine if item.kind == "gauge"}
        self._last: Values = {}

    def record(self, values: Values) -> None:
        """Exports the numbers. Counters that have shrunk (their process was replaced) go on from the new number."""
        for (name, value), number in values.items():
            if (gauge := self._gauges.get(name)) is not None:
                gauge.set(number)
                continue
            before = self._last.get((name, value), 0.0)
            self._last[name, value] = number
            label = self._labels[name]
            if number > before:  # Ray refuses 0
                self._counters[name].inc(number - before, None if label is None else {label: value})


def worker_values(stats: WorkerStats) -> Values:
    """Numbers of one encoder."""
    values: Values = {(name, ""): float(getattr(stats, field)) for name, field in OF_WORKER.items()}
    starved: Mapping[str, str] = STARVED
    return values | {("lathe_starved_seconds_total", cause): getattr(stats, field) for cause, field in starved.items()}
