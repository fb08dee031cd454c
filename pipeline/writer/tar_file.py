"""Writer of WebDataset tars with reproducible bytes; tensors are written in pieces of a few MiB.

Takes sorted groups of `LatentRow`s of one bucket, returns a finished local file and its `IndexRow`s. The first member is `__latentset__`.
Each clip has adjacent members: `{id}.latent.npy` (`.latent.safetensors` for bfloat16, int8, zstd or moments), what `write.store` adds
(`{id}.i2v_cond.npy` or `.safetensors`, `{id}.first_frame.webp` or `.png`), paired videos (`{id}.NAME.npy`), `{id}.txt`, `{id}.json`.
"""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pipeline.format.columns import METADATA_MEMBER
from pipeline.format.index import IndexRow, index_row
from pipeline.format.stored import FIRST_FRAME, I2V_COND, LATENT, LOGVAR, STORED
from pipeline.format.tensors import image_suffix, npy_header, release_pages, safetensors_header

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from pipeline.format.columns import LatentRow
    from pipeline.format.tensors import Payload

COPY_BYTES = 4 * 1024 * 1024


class TarFileBuilder:
    """Builder of one file of one bucket. Equal rows in equal order give equal bytes: no times, no owners."""

    suffix = ".tar"

    def __init__(
        self,
        path: Path,
        metadata: dict[str, Any],
        *,
        moments: bool,
        store: Collection[str] = (),
        without: Collection[str] = (),
    ) -> None:
        """`moments`, `store`, `without`: as for Parquet, where they decide the columns; here each row has the members of its tensors."""
        del moments, store, without
        self._path = path
        self._file = path.open("wb")
        # PAX writes plain USTAR headers and adds an extended one only for names over 100 bytes or members over 8 GiB.
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT, copybufsize=COPY_BYTES)
        self._rows: list[IndexRow] = []
        self._num_bytes = 0
        self._add(METADATA_MEMBER, [json.dumps(metadata, sort_keys=True, indent=1).encode()])

    @property
    def num_bytes(self) -> int:
        """Tensor bytes written so far."""
        return self._num_bytes

    def append(self, rows: Sequence[LatentRow]) -> None:
        """Writes `rows` in the order given."""
        for row in rows:
            offsets = self._add_tensors(row)
            # Written also without caption: readers that ask for a tuple of fields fail on a sample that lacks one.
            # In the json, "no caption" is null and an empty one is "".
            self._add(f"{row.id}.txt", [(row.scalars["caption"] or "").encode()])
            described = {
                "id": row.id,
                "vae_latent_shape": row.latent.shape,
                "vae_latent_dtype": row.latent.dtype,
                **row.scalars,
            }
            self._add(f"{row.id}.json", [json.dumps(described).encode()])
            self._rows.append(index_row(row, len(self._rows), offsets))
            self._num_bytes += row.num_bytes

    def close(self) -> list[IndexRow]:
        """Finishes the file."""
        self._tar.close()
        self._file.close()
        return self._rows

    def discard(self) -> None:
        """Stops writing and deletes the file; safe at any time."""
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # closing flushes; the file is discarded, so errors are ignored
            self._file.close()

    def _add_tensors(self, row: LatentRow) -> dict[str, int]:
        """Offset of each tensor by name."""
        named = {
            "mean" if name == LATENT else name: row.tensors[name] for name in (LATENT, LOGVAR) if name in row.tensors
        }
        offsets = dict(zip((LATENT, LOGVAR), self._add_arrays(f"{row.id}.latent", named), strict=False))
        if (cond := row.tensors.get(I2V_COND)) is not None:
            (offsets[I2V_COND],) = self._add_arrays(f"{row.id}.{I2V_COND}", {I2V_COND: cond})
        if (image := row.tensors.get(FIRST_FRAME)) is not None:
            suffix = image_suffix(bytes(image.data[:16]))
            offsets[FIRST_FRAME] = self._add(f"{row.id}.{FIRST_FRAME}.{suffix}", [image.data])
        for name in (name for name in row.tensors if name not in STORED):
            (offsets[name],) = self._add_arrays(f"{row.id}.{name}", {name: row.tensors[name]})
        return offsets

    def _add_arrays(self, name: str, tensors: dict[str, Payload]) -> list[int]:
        """One member: a `.npy` of one plain tensor that numpy has a type for, else safetensors. Returns the offset of each tensor."""
        first, *more = tensors.values()
        if not more and first.dtype in ("float16", "float32"):
            header = npy_header(first.shape, first.dtype)
            return [self._add(f"{name}.npy", [header, first.data]) + len(header)]
        header = safetensors_header(tensors)
        parts: list[bytes | memoryview] = [header, *(tensor.data for tensor in tensors.values())]
        begin = self._add(f"{name}.safetensors", parts) + len(header)
        return list(accumulate([tensor.num_bytes for tensor in tensors.values()][:-1], initial=begin))

    def _add(self, name: str, parts: list[bytes | memoryview]) -> int:
        """Adds a member made of `parts`. Returns the offset of its first content byte in the file."""
        member = tarfile.TarInfo(name)
        member.size = sum(len(part) for part in parts)
        member.mode = 0o644
        self._tar.addfile(member, _Parts(parts))
        padded = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._file.tell() - padded


class _Parts(io.RawIOBase):
    """Stream of byte parts, read one after the other without joining them."""

    def __init__(self, parts: list[bytes | memoryview]) -> None:
        self._parts = [memoryview(part) for part in parts]

    def read(self, size: int = -1) -> bytes:
        pieces, missing = [], size if size >= 0 else sum(len(part) for part in self._parts)
        while missing and self._parts:
            piece, rest = self._parts[0][:missing], self._parts[0][missing:]
            pieces.append(bytes(piece))
            release_pages(piece.obj)
            missing -= len(piece)
            self._parts[0] = rest
            if not len(rest):
                del self._parts[0]
        return b"".join(pieces)
