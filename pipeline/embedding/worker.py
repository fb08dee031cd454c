"""Worker of `lathe embed`: one encoder, pinned to its device. A unit in, the receipt that counts for it out."""

from __future__ import annotations

import platform
import secrets
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.embedding.checkpoint import describe, find_files
from pipeline.embedding.units import ImageUnit, TextUnit
from pipeline.errors import CheckpointDiffers, InputError
from pipeline.format.tensors import payload_hash
from pipeline.process import kill_points as drill
from pipeline.process.scratch import ScratchFolder
from pipeline.sidecars.names import unit_of
from pipeline.sidecars.receipts import SidecarReceipts
from pipeline.sidecars.storing import store_unit
from pipeline.storage import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from pipeline.config import EmbedJob
    from pipeline.embedding.texts import Encoded
    from pipeline.sidecars.description import SidecarSet
    from pipeline.sidecars.receipts import SidecarReceipt

Unit = TextUnit | ImageUnit


class EmbeddingWorker:
    """One encoder. `root`: URI of the output."""

    def __init__(self, job: EmbedJob, described: SidecarSet, root: str, device: str) -> None:
        """Loads the encoder.

        Raises:
            CheckpointDiffers: the files on this machine are not those that the run was planned with.
            CheckpointError, ConfigError: see `checkpoint.find_files` and the encoders.
        """
        self._job, self._set = job, described
        self._store = open_store(root, job.storage)
        self._receipts = SidecarReceipts(self._store, described.name)
        drill.fire(job.drill, "in_load")
        files = find_files(job)
        if job.from_column is None:
            from pipeline.embedding.texts import TextEncoder

            self._encoder: Any = TextEncoder(job, files, device)
        else:
            from pipeline.embedding.images import ImageEncoder

            self._encoder = ImageEncoder(job, files, device)
        found = describe(job, find_files(job))  # after loading, so that files replaced meanwhile are noticed
        if found.fingerprint != described.fingerprint:
            names = [name for name in found.parts if found.parts[name] != described.parts.get(name)]
            raise CheckpointDiffers(
                f"the encoder on {platform.node()} has other {', '.join(names)} than the run was planned with; delete the copy there, "
                "or run again if the checkpoint was replaced"
            )
        self._notes = {"host": platform.node(), "device": device, "versions": _versions()}

    def run(self, unit: Unit) -> tuple[SidecarReceipt, bool]:
        """The receipt that counts for the unit, and whether this attempt made it.

        Raises:
            InputError: an image that is damaged.
            BuildError: a value that is not finite.
            StorageUnavailable: the store or the local disk failed.
        """
        keys = unit.keys
        name = unit_of(self._set.fingerprint, keys)
        if (done := self._receipts.find(name)) is not None:
            return done, False
        attempt, counts = secrets.token_hex(8), {"tokens": 0, "truncated": 0}
        with ScratchFolder() as folder:
            made = store_unit(
                self._store,
                self._set,
                name,
                attempt,
                self._rows(unit, keys, counts),
                folder,
                counts=counts,
                notes=self._notes,
                failures=self._job.drill,
            )
        return made, made.attempt == attempt

    def _rows(
        self, unit: Unit, keys: list[bytes], counts: dict[str, int]
    ) -> Iterator[tuple[bytes, str, dict[str, np.ndarray]]]:
        for encoded in self._encoded(unit):
            key = keys[encoded.place]
            name = key.hex() if isinstance(unit, TextUnit) else unit.images[encoded.place].id
            counts["tokens"] += encoded.tokens
            counts["truncated"] += encoded.truncated
            yield key, name, encoded.tensors

    def _encoded(self, unit: Unit) -> Iterator[Encoded]:
        if isinstance(unit, TextUnit):
            return iter(self._encoder.encode(unit.texts))
        return iter(self._encoder.encode([self._image(image) for image in unit.images]))

    def _image(self, image: Any) -> bytes:
        data = self._store.read_range(image.key, image.offset, image.length)
        if payload_hash(data) != image.hash:
            raise InputError(f"{self._store.uri(image.key)}: the image of {image.id} is damaged; see `lathe verify`")
        return data


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("lathe", "torch", "transformers")}
