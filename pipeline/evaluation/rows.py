"""Files with one row per clip and reject, written as results arrive: `clips.parquet`, `rejects.jsonl`; also counts rejects by reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from pipeline.evaluation.measuring import ClipResult
    from pipeline.records import ClipPlan, Reject, Sample

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("clip", pa.int32(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("psnr", pa.float64(), nullable=False),
        pa.field("psnr_of_mse", pa.float64(), nullable=False),
        pa.field("ssim", pa.float64(), nullable=False),
        pa.field("lpips", pa.float64()),
        pa.field("degree", pa.float64()),
        pa.field("ssim_by_position", pa.list_(pa.float64()), nullable=False),
        pa.field("frame_psnr", pa.list_(pa.float32()), nullable=False),
        pa.field("frame_ssim", pa.list_(pa.float32()), nullable=False),
    ]
)
ROWS_PER_GROUP = 1000
EXAMPLES = 3  # keys listed per reason


class ClipRows:
    """Context manager that writes both files. The parquet file is created with its first row."""

    def __init__(self, clips: Path, rejects: Path) -> None:
        self._path = clips
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._rejects = rejects.open("w", encoding="utf-8")
        self.rejected = 0
        self.reasons: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> ClipRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
        self._rejects.close()

    def add(self, sample: Sample, plan: ClipPlan, result: ClipResult) -> None:
        """Writes one clip."""
        quality = result.quality
        self._rows.append(
            {
                "key": sample.key,
                "clip": plan.index,
                "bucket": str(plan.bucket),
                "source": _storable(sample.uri),
                "start_s": plan.start_s,
                "frames": quality.frames,
                "height": plan.bucket.height,
                "width": plan.bucket.width,
                "psnr": quality.psnr,
                "psnr_of_mse": quality.psnr_of_mse,
                "ssim": quality.ssim,
                "lpips": quality.lpips,
                "degree": quality.degree,
                "ssim_by_position": quality.ssim_positions,
                "frame_psnr": quality.frame_psnr,
                "frame_ssim": quality.frame_ssim,
            }
        )
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def reject(self, reject: Reject) -> None:
        """Writes an input, or a clip of one, that was not measured."""
        row = {name: _storable(value) if isinstance(value, str) else value for name, value in reject.to_dict().items()}
        self._rejects.write(json.dumps(row) + "\n")
        self.rejected += 1
        reason = self.reasons.setdefault(
            reject.reason, {"count": 0, "policy": reject.policy, "keys": [], "message": reject.message}
        )
        reason["count"] += 1
        key = reject.key or "?"
        if len(reason["keys"]) < EXAMPLES and key not in reason["keys"]:
            reason["keys"].append(key)

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, SCHEMA)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._rows = []


def _storable(text: str) -> str:
    """`text` as valid Unicode, as in a latent's row: bytes of a file name that are not UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
