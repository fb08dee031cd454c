"""A data file being written: what its rows have in common, the rows that wait for their row group, its builder. Part of the writer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pipeline.writer.parquet_file import ParquetFileBuilder
from pipeline.writer.tar_file import TarFileBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.format.columns import LatentRow
    from pipeline.format.index import IndexRow


class DataFileBuilder(Protocol):
    """Builder of one data file in a container format: takes sorted rows, returns a finished local file and index rows."""

    suffix: str

    @property
    def num_bytes(self) -> int:
        """Tensor bytes written so far."""
        ...

    def append(self, rows: Sequence[LatentRow]) -> None:
        """Writes rows of the file's bucket."""
        ...

    def close(self) -> list[IndexRow]:
        """Finishes the file."""
        ...

    def discard(self) -> None:
        """Deletes the unfinished file."""
        ...


BUILDERS: dict[str, type[ParquetFileBuilder] | type[TarFileBuilder]] = {
    "parquet": ParquetFileBuilder,
    "tar": TarFileBuilder,
}


class FileKind(NamedTuple):
    """What the rows of a file have in common. `paired`: whether they have the members of the job, if it has any."""

    bucket: str
    paired: bool


@dataclass(slots=True)
class OpenFile:
    """Rows of one kind being written: those that wait for their row group, and the open file, if any."""

    waiting: list[LatentRow] = field(default_factory=list)
    waiting_bytes: int = 0
    builder: DataFileBuilder | None = None
    path: Path = Path()
    seq: int = 0
    fps: set[float] = field(default_factory=set)  # of all rows of the file

    @property
    def index_path(self) -> Path:
        """Beside the data file."""
        return self.path.with_suffix(".idx")
