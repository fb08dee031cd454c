"""Import of a table of tensors that others made, as a sidecar set. Everything is checked before anything is written.

Tables may be added to a set one after another. Rows that the set has are compared: the same tensors are passed over, others are refused.
"""

from __future__ import annotations

import difflib
import secrets
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.embedding.table import open_table
from pipeline.embedding.units import FIRST, caption_sources, coverage_of
from pipeline.errors import ConfigError, InputError
from pipeline.format.tensors import stored_values
from pipeline.loader.captions import CaptionRule
from pipeline.loader.dataset import LatentDataset
from pipeline.process.scratch import ScratchFolder
from pipeline.sidecars.description import FLOATS, SidecarSet, TensorKind, check_set
from pipeline.sidecars.file_index import packed_array
from pipeline.sidecars.files import tensor_payload
from pipeline.sidecars.names import BY_CAPTION, BY_ID, key_of, unit_of
from pipeline.sidecars.reading import SidecarReader
from pipeline.sidecars.storing import store_unit
from pipeline.sidecars.versions import SetVersions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import StorageConfig
    from pipeline.embedding.table import Kind, Table
    from pipeline.loader.row import Row

    Rows = list[tuple[bytes, str, dict[str, np.ndarray]]]

UNIT_BYTES = 64 * 1024 * 1024
NAMED = 3
SEARCHED = 20_000  # ids among which a similar one is looked for


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import. `name`: of the set; `about`: what made the tensors, recorded in its fingerprint; `by`: key of a safetensors table.

    `captions`: those of a row that the table may be of, as in `EmbedJob`.
    """

    table: str
    name: str
    about: str = ""
    by: str | None = None
    fingerprint: str | None = None
    skip_unknown: bool = False
    captions: tuple[str, ...] = (FIRST,)


@dataclass(slots=True)
class ImportReport:
    """What an import did. `unknown`: keys of the table that no row has; `lacking`: rows of the snapshot that have no tensors after it."""

    name: str
    output: str
    snapshot: int
    version: int = 0
    imported: int = 0
    present: int = 0
    unknown: int = 0
    rows: int = 0
    lacking: int = 0
    by: str = ""
    tensors: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def import_table(output: str, request: ImportRequest, storage: StorageConfig) -> ImportReport:
    """Writes the tensors of a table as rows of a sidecar set of `output`, and makes the next version of the set.

    Raises:
        InputError: not such a table; ids that the snapshot does not have; rows of different types or widths, twice, or not finite; other
            tensors than the set has for a key.
        ConfigError: a set of this name that was made differently; not a source of captions, or one for a table by id.
        OutputError: not an output, or an object of it that cannot be read.
    """
    table = open_table(request.table, request.by, storage)
    if table.key == "id" and request.captions != (FIRST,):
        raise ConfigError(f"captions: {request.table} is by id, and a caption has no part in it; leave it out")
    rule = CaptionRule(caption_sources(request.captions))
    dataset = LatentDataset.open(output, columns=rule.columns, fingerprint=request.fingerprint, storage=storage)
    try:
        return _Import(dataset, table, request, rule).run()
    finally:
        dataset.close()


class _Import:
    def __init__(self, dataset: LatentDataset, table: Table, request: ImportRequest, rule: CaptionRule) -> None:
        self._dataset, self._table, self._request, self._rule = dataset, table, request, rule
        self._store = dataset.store
        self._by_id = table.key == "id"
        self._report = ImportReport(request.name, dataset.store.root, dataset.snapshot or 0, by=table.key)

    def run(self) -> ImportReport:
        keys, described = self._checked()
        needed = self._needed()
        unknown = self._unknown(keys, set().union(*needed))
        for text, tensors in self._table.rows():
            self._check_values(described, text, tensors)
        if check_set(self._store, described) is None and len(unknown) == len(keys):
            raise InputError(
                f"{self._request.table}: expected rows that snapshot {self._report.snapshot} needs, got {len(keys)} others; no set was made"
            )
        report, versions = self._report, SetVersions(self._store, described.name)
        report.tensors = {name: str(kind) for name, kind in described.tensors.items()}
        done = set(packed_array(versions.keys_done()))
        if done:
            versions.publish()  # what a killed import left, to compare with
        self._write(described, unknown, done)
        have = done | (set(keys) - unknown)
        report.rows, report.unknown = len(self._dataset), len(unknown)
        report.lacking = sum(count for of_row, count in needed.items() if not have.issuperset(of_row))
        captions = () if self._by_id else self._rule.sources
        complete = None if report.lacking else coverage_of(self._dataset, captions)
        report.version = versions.publish(complete, captions).number
        return report

    def _checked(self) -> tuple[dict[bytes, str], SidecarSet]:
        """Keys of the table with their texts, and the set that it makes."""
        keys: dict[bytes, str] = {}
        kinds: Counter[tuple[tuple[str, TensorKind], ...]] = Counter()
        example: dict[Any, str] = {}
        for text, tensors in self._table.kinds():
            key = self._table.key_bytes(text)
            if key in keys:
                raise InputError(f"{self._request.table} has the {self._table.key} {text!r} twice; expected each once")
            keys[key] = text
            kind = tuple((name, _in_a_set(one)) for name, one in sorted(tensors.items()))
            kinds[kind] += 1
            example.setdefault(kind, text)
        if not keys:
            raise InputError(f"{self._request.table} has no row")
        if len(kinds) > 1:
            found = "; ".join(
                f"{count} rows with {_words(kind)}, such as {example[kind]!r}"
                for kind, count in kinds.most_common(NAMED)
            )
            raise InputError(
                f"{self._request.table}: expected the same tensors, types and widths in all rows, got {found}"
            )
        (kind,) = kinds
        parts = {"imported": self._request.about}
        return keys, SidecarSet(self._request.name, BY_ID if self._by_id else BY_CAPTION, dict(kind), parts)

    def _needed(self) -> Counter[tuple[bytes, ...]]:
        """Keys that a row of the snapshot needs, with the number of such rows."""

        def texts(row: Row) -> list[str]:
            return [row.id] if self._by_id else self._rule.candidates(row.caption, row.columns) or [""]

        return Counter(tuple(map(key_of, texts(row))) for _, _, row in self._dataset.placed())

    def _unknown(self, keys: dict[bytes, str], needed: set[bytes]) -> set[bytes]:
        """Keys of the table that no row needs, the empty caption aside."""
        unknown = {key for key in keys if key not in needed and (self._by_id or key != key_of(""))}
        if unknown and not self._request.skip_unknown:
            names = [self._described_name(keys[key]) for key in sorted(unknown, key=keys.__getitem__)[:NAMED]]
            what = "ids" if self._by_id else "captions"
            other = "" if self._by_id else f", --captions for others than {', '.join(self._rule.sources)}"
            raise InputError(
                f"{len(unknown)} of {len(keys)} {what} of {self._request.table} are in no row of snapshot {self._report.snapshot} of "
                f"{self._store.root}, such as {', '.join(names)}; give the right ones{other}, or --skip-unknown to leave them out"
            )
        return unknown

    def _described_name(self, text: str) -> str:
        if not self._by_id:
            return repr(text[:60])
        ids = [row.id for _, (_, _, row) in zip(range(SEARCHED), self._dataset.placed(), strict=False)]
        near = difflib.get_close_matches(text, ids, 1, 0.6)
        return f"{text!r} (there is {near[0]!r})" if near else repr(text)

    def _write(self, described: SidecarSet, unknown: set[bytes], done: set[bytes]) -> None:
        reader = SidecarReader(self._store, described.name) if done else None
        with ScratchFolder() as folder:
            for rows in self._units(unknown, done, reader):
                unit = unit_of(described.fingerprint, [key for key, _, _ in rows])
                store_unit(
                    self._store,
                    described,
                    unit,
                    secrets.token_hex(8),
                    rows,
                    folder,
                    notes={"table": self._request.table},
                )
                self._report.imported += len(rows)

    def _units(self, unknown: set[bytes], done: set[bytes], reader: SidecarReader | None) -> Iterator[Rows]:
        waiting: Rows = []
        size = 0
        for text, tensors in self._table.rows():
            key = self._table.key_bytes(text)
            if key in unknown:
                continue
            if key in done and reader is not None:
                self._compare(reader, key, text, tensors)
                self._report.present += 1
                continue
            waiting.append((key, text if self._by_id else key.hex(), tensors))
            size += sum(array.nbytes for array in tensors.values())
            if size >= UNIT_BYTES:
                yield waiting
                waiting, size = [], 0
        if waiting:
            yield waiting

    def _check_values(self, described: SidecarSet, text: str, tensors: dict[str, np.ndarray]) -> None:
        for name, array in tensors.items():
            dtype = described.tensors[name].dtype
            if dtype in FLOATS and not np.isfinite(stored_values(array.tobytes(), dtype, array.shape)).all():
                raise InputError(f"{self._request.table}: {name} of {text!r} has values that are not finite")

    def _compare(self, reader: SidecarReader, key: bytes, text: str, tensors: dict[str, np.ndarray]) -> None:
        (position,) = reader.find([key])
        for name, array in tensors.items():
            digest = tensor_payload(array, reader.described.tensors[name].dtype).hash
            if position is None or reader.place(position, name).hash.hex() != digest:
                raise InputError(
                    f"{self._request.table}: {name} of {text!r} is another tensor than sidecar set {reader.name} has; import the table "
                    "under another --name"
                )


def _in_a_set(one: Kind) -> TensorKind:
    """What all rows share of a tensor: of `[L, D]` the width, of numbers `[D]` the length, of a mask `[L]` nothing."""
    if len(one.shape) > 1:
        return TensorKind(one.dtype, (None, *one.shape[1:]))
    return TensorKind(one.dtype, one.shape if one.dtype in FLOATS else (None,) * len(one.shape))


def _words(kind: tuple[tuple[str, TensorKind], ...]) -> str:
    return ", ".join(f"{name} {one}" for name, one in kind) or "no tensors"
