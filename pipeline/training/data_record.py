"""Record of what decides the clips and the perceptual loss of a run, `data.json` in its folder, compared when the run continues."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipeline.training.job import TrainJob

# Options of `decode` that training does not use.
WITHOUT_EFFECT = {"timeout_s", "memory_bytes", "device", "nvdec_min_pixels"}
NOT_OF_CLIPS = "lpips"


class DataRecord:
    """Sections of a job beside the record of the run at `path`, if there is one.

    Attributes:
        changes: descriptions of changed options, by name.
    """

    def __init__(self, path: Path, job: TrainJob) -> None:
        self._path = path
        self._wanted = job.data.model_dump(mode="json", exclude={"cache_bytes"}) | {
            "decode": job.decode.model_dump(mode="json", exclude=WITHOUT_EFFECT),
            "lpips": None if job.lpips is None else job.lpips.model_dump(mode="json"),
        }
        begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.changes = dict(_changes(begun, self._wanted))

    @property
    def clips_changed(self) -> bool:
        """Whether clips are drawn from other videos or in another way than before."""
        return any(name.partition(".")[0] != NOT_OF_CLIPS for name in self.changes)

    def write(self) -> None:
        """Replaces the record. Call it with the folder's lock."""
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text(json.dumps(self._wanted, indent=1), encoding="utf-8")
        partial.replace(self._path)


def _changes(before: dict[str, Any], now: dict[str, Any], parent: str = "") -> Iterator[tuple[str, str]]:
    """Names and descriptions of options that differ. Those that `before` lacks are of a later version and not compared."""
    for key in (key for key in now if key in before):
        name, was, wanted = f"{parent}{key}", before[key], now[key]
        if isinstance(was, dict) and isinstance(wanted, dict):
            yield from _changes(was, wanted, f"{name}.")
        elif was != wanted:
            yield name, f"{name}: was {was!r}, is {wanted!r}"
