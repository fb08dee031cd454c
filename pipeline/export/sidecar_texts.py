"""Text embeddings of an export from sidecar sets of the output: those of each row's caption, or of its id.

`SET` gives all tensors of a set by their names, `NAME=SET.TENSOR` one of them under another name. Rows without a caption have the tensors
of the empty one.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipeline.errors import ConfigError, InputError
from pipeline.export.texts import EMBEDDING, STORED
from pipeline.sidecars.names import BY_CAPTION, key_of
from pipeline.sidecars.reading import SidecarReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pipeline.export.rows import Row
    from pipeline.storage import Store

_ONE = re.compile(r"(?P<name>[^=]+)=(?P<set>[^=@]+?)(?P<number>@\d+)?\.(?P<tensor>[^.=]+)")


class _Part(NamedTuple):
    """One tensor of the export: its name there, the set and the name in the set."""

    name: str
    reader: SidecarReader
    tensor: str


class SidecarTexts:
    """`Texts` of sidecar sets. `requests`: as in the module."""

    def __init__(self, store: Store, requests: Sequence[str]) -> None:
        """Raises InputError or ConfigError for sets or tensors that there are not, or a name twice."""
        self.label = f"--sidecar {' --sidecar '.join(requests)}"
        self._store = store
        self._parts: list[_Part] = []
        for text in requests:
            self._parts += _parts(store, text)
        self.names = tuple(part.name for part in self._parts)
        if len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"{self.label}: gives {', '.join(self.names)}; expected each name once, see NAME=SET.TENSOR"
            )
        main = next((part for part in self._parts if part.name == EMBEDDING), None)
        kind = None if main is None else main.reader.described.tensors[main.tensor]
        width = None if kind is None or len(kind.shape) != 2 else kind.shape[-1]
        if main is None or kind is None or width is None:
            raise InputError(
                f"{self.label}: gives {', '.join(self.names)}; expected {EMBEDDING} [tokens, width] among them"
            )
        self._main, self.width, self.dtype = main, width, kind.dtype
        self.key = "caption" if self._by_caption(main) else "id"

    @property
    def facts(self) -> dict[str, Any]:
        """What all exports into one directory must share."""
        # With its name: imported sets of one --about have one fingerprint.
        sets = {
            part.name: f"{part.reader.name} {part.reader.described.fingerprint} {part.tensor}" for part in self._parts
        }
        return {"width": self.width, "dtype": self.dtype, "sidecars": sets}

    @functools.cached_property
    def lengths(self) -> tuple[int, int]:
        """Least and greatest number of tokens in the set. Reads the index of every file."""
        reader, tensor = self._main.reader, self._main.tensor
        found = [reader.place(position, tensor).shape[0] for position in reader.positions()]
        return min(found, default=0), max(found, default=0)

    def position(self, row: Row) -> int | None:
        """0 if the sets have all tensors of a row, else None."""
        return 0 if all(self._found(part, row) is not None for part in self._parts) else None

    def tensors(self, row: Row) -> dict[str, Tensor]:
        """All tensors of a row by name.

        Raises:
            InputError: a set does not have it.
            OutputError: damaged bytes.
        """
        found = {}
        for part in self._parts:
            if (position := self._found(part, row)) is None:
                raise InputError(f"{self.label}: {part.reader.identity} has no tensors for {row.id} ({self.key})")
            array = part.reader.tensor(position, part.tensor)
            kind = part.reader.described.tensors[part.tensor]
            found[part.name] = torch.frombuffer(bytearray(array.tobytes()), dtype=STORED[kind.dtype]).reshape(
                array.shape
            )
        return found

    @staticmethod
    def _by_caption(part: _Part) -> bool:
        return part.reader.described.key == BY_CAPTION

    def _found(self, part: _Part, row: Row) -> Any:
        text = (row.caption or "") if self._by_caption(part) else row.id
        return part.reader.find([key_of(text)])[0]


def _parts(store: Store, text: str) -> list[_Part]:
    if "=" not in text:
        reader = SidecarReader(store, text)
        return [_Part(name, reader, name) for name in reader.described.tensors]
    if (match := _ONE.fullmatch(text)) is None:
        raise ConfigError(f"--sidecar {text}: expected SET, or NAME=SET.TENSOR such as clip_embedding=clip.pooled")
    reader = SidecarReader(store, f"{match['set']}{match['number'] or ''}")
    if match["tensor"] not in reader.described.tensors:
        names = ", ".join(reader.described.tensors)
        raise InputError(f"--sidecar {text}: the set has the tensors {names}, not {match['tensor']}")
    return [_Part(match["name"], reader, match["tensor"])]
