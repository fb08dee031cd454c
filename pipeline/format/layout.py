"""Names of the objects of an output, by format version: plain data and functions, no I/O.

Everything that is not data has a name that starts with `_` or `.`: engines that scan a folder (Spark, pyarrow, Hive) skip such names.
Side indexes are Parquet inside and are not called `.parquet`, because tools that glob `**/*.parquet` read those of version 1 as data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DATA = "data/"
DELTA_LOG = f"{DATA}_delta_log/"  # view of snapshots; Delta Lake wants it there
SNAPSHOTS = "_snapshots/"
TAKEDOWNS = "_takedowns/"
RETIRED = "_retired/"
COMPACTED = "compacted-"  # begins the attempt in keys of files that `lathe compact` wrote
LEASES = "_leases/"
NIGHTS = "_runs/"
SIDECARS = "_sidecars/"
COMPILE = "_compile/"
CARD_KEY = "_README.md"
HUGGING_FACE_KEY = ".huggingface.yaml"

# Objects that other readers write into the folders that they read. Neither data nor orphans of a killed build.
_CACHES = re.compile(
    r"(.*/)?(map_style_cache|sharding_info_[^/]*|\.nv-meta)/.*"  # FastVideo, Megatron-Energon
    r"|.*\.tar\.idx"  # Megatron-Energon
    r"|(.*/)?index\.json"  # litdata, wids
)
_ATTEMPT = "[A-Za-z0-9_-]+"
_UNDO = ".undo.json"


@dataclass(frozen=True, slots=True)
class ReceiptName:
    """Parsed key of a receipt. `attempt` is set on stores that cannot refuse a second writer."""

    shard_id: str
    attempt: str | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Keys of one format version. Prefixes end in `/`."""

    version: int
    set_key: str
    """Object that marks the folder as a latent set."""
    receipts: str
    index: str
    index_suffix: str
    summaries: str
    summary_suffix: str
    progress: str
    runs: str

    def data_key(self, fingerprint: str, bucket: str, stem: str, suffix: str) -> str:
        """Key of a data file: `data/{fp8}/{bucket}/{stem}{suffix}`."""
        return f"{DATA}{fingerprint[:8]}/{bucket}/{stem}{suffix}"

    def index_key(self, data_key: str) -> str:
        """Key of the side index of a data file."""
        return f"{self.index}{data_key.removeprefix(DATA).rpartition('.')[0]}{self.index_suffix}"

    def file_stem(self, key: str) -> str | None:
        """`{fp8}/{bucket}/{shard16}-{attempt}-{seq}` of a data file or side index; None if `key` is not the key of one."""
        stem = rf"([0-9a-f]{{8}}/v[^/]+/[0-9a-f]{{16}}-{_ATTEMPT}-\d{{5,}})"
        match = re.fullmatch(rf"{DATA}{stem}\.(?:parquet|tar)|{self.index}{stem}{re.escape(self.index_suffix)}", key)
        return None if match is None else match[1] or match[2]

    def receipt_key(self, shard_id: str, attempt: str | None = None) -> str:
        """Key of a receipt; with `attempt`, its key on stores that cannot refuse a second writer."""
        return f"{self.receipts}{shard_id}{'' if attempt is None else f'--{attempt}'}.json"

    def receipt_name(self, key: str) -> ReceiptName | None:
        """Inverse of `receipt_key`; None if `key` is not the key of a receipt."""
        match = re.fullmatch(rf"{self.receipts}([0-9a-f]{{32}})(?:--({_ATTEMPT}))?\.json", key)
        return None if match is None else ReceiptName(match[1], match[2])

    def summary_key(self, digest: str) -> str:
        """Key of a cache of receipt summaries, from 16 hex digits."""
        return f"{self.summaries}{digest}{self.summary_suffix}"

    def is_summary(self, key: str) -> bool:
        """Whether `key` was made by `summary_key`."""
        return re.fullmatch(rf"{self.summaries}[0-9a-f]{{16}}{re.escape(self.summary_suffix)}", key) is not None

    def progress_key(self, build: str) -> str:
        """Key of the heartbeat of a running build."""
        return f"{self.progress}{build}.json"

    def run_log_key(self, build: str, part: int) -> str:
        """Key of a part of the run log of a build; parts count from 1."""
        return f"{self.runs}{build}/{part:04d}.jsonl"

    def run_log_name(self, key: str) -> tuple[str, int] | None:
        """Inverse of `run_log_key`; None if `key` is not the key of a part."""
        match = re.fullmatch(rf"{self.runs}([^/]+)/(\d{{4}})\.jsonl", key)
        return None if match is None else (match[1], int(match[2]))


LAYOUTS = {
    1: Layout(
        version=1,
        set_key="latentset.json",
        receipts="receipts/",
        index="index/",
        index_suffix=".idx.parquet",
        summaries="summaries/",
        summary_suffix=".parquet",
        progress="progress/",
        runs="runs/",
    ),
    2: Layout(
        version=2,
        set_key="_latentset.json",
        receipts="_receipts/",
        index="_index/",
        index_suffix=".idx",
        summaries="_summaries/",
        summary_suffix=".cache",
        progress="_progress/",
        runs="_runs/",
    ),
}
CURRENT = LAYOUTS[2]
"""Layout of new outputs."""

SET_KEYS = tuple(layout.set_key for layout in LAYOUTS.values())
OWN_OBJECTS = (*SET_KEYS, CARD_KEY, HUGGING_FACE_KEY)
OWN_FOLDERS = (
    *(DATA, SNAPSHOTS, TAKEDOWNS, LEASES, NIGHTS, RETIRED, SIDECARS, COMPILE),
    *(
        prefix
        for one in LAYOUTS.values()
        for prefix in (one.receipts, one.index, one.summaries, one.progress, one.runs)
    ),
)
"""Folders of an output of any version; with `OWN_OBJECTS`, everything in it. An output may lie inside a folder of inputs."""


def snapshot_key(number: int) -> str:
    """Key of a published snapshot."""
    return f"{SNAPSHOTS}{number}.json"


def snapshot_number(key: str) -> int | None:
    """Inverse of `snapshot_key`; None if `key` is not the key of a snapshot."""
    match = re.fullmatch(rf"{SNAPSHOTS}([1-9]\d*)\.json", key)
    return None if match is None else int(match[1])


def snapshot_table_key(number: int, name: str, sha256: str) -> str:
    """Key of a table of a snapshot (Parquet), such as its manifest of data files, `name` "files".

    The key contains a hash of the contents: two publishers of one number never write different bytes to the same key.
    """
    return f"{SNAPSHOTS}{number}/{name}-{sha256[:16]}.idx"


def is_snapshot_table(key: str) -> bool:
    """Whether `key` was made by `snapshot_table_key`."""
    return re.fullmatch(rf"{SNAPSHOTS}[1-9]\d*/[a-z]+-[0-9a-f]{{16}}\.idx", key) is not None


def snapshot_page_key(number: int) -> str:
    """Key of the report page of a snapshot, HTML."""
    return f"{SNAPSHOTS}{number}.html"


def snapshot_values_key(number: int) -> str:
    """Key of the values of that page, JSON."""
    return f"{SNAPSHOTS}{number}.report.json"


def reported_snapshot(key: str) -> int | None:
    """Inverse of `snapshot_page_key` and `snapshot_values_key`; None if `key` is not the key of one."""
    match = re.fullmatch(rf"{SNAPSHOTS}([1-9]\d*)\.(?:html|report\.json)", key)
    return None if match is None else int(match[1])


def takedown_key(name: str) -> str:
    """Key of the record of a takedown."""
    return f"{TAKEDOWNS}{name}.json"


def undo_key(record: str) -> str:
    """Key of the object that undoes the takedown with the key `record`."""
    return f"{record.removesuffix('.json')}{_UNDO}"


def undone_record(key: str) -> str | None:
    """Inverse of `undo_key`; None if `key` is not the key of such an object."""
    return f"{key.removesuffix(_UNDO)}.json" if key.endswith(_UNDO) else None


def retired_key(shard_id: str, attempt: str) -> str:
    """Key of a receipt whose inputs all count in other receipts or not at all: `lathe gc` moves it here."""
    return f"{RETIRED}{shard_id}--{attempt}.json"


def retired_receipt(key: str) -> ReceiptName | None:
    """Inverse of `retired_key`; None if `key` is not the key of such a receipt."""
    match = re.fullmatch(rf"{RETIRED}([0-9a-f]{{32}})--({_ATTEMPT})\.json", key)
    return None if match is None else ReceiptName(match[1], match[2])


def lease_key(name: str, number: int) -> str:
    """Key of a lease object; the highest number counts."""
    return f"{LEASES}{name}/{number}.json"


def compile_key(fingerprint: str) -> str:
    """Key of the record whether latents are of a compiled network; `fingerprint` of those that are not, with otherwise equal settings."""
    return f"{COMPILE}{fingerprint}.json"


def night_report_key(night: str) -> str:
    """Key of the report of a nightly run."""
    return f"{NIGHTS}{night}.report.json"


def night_of_report(key: str) -> str | None:
    """Inverse of `night_report_key`; None if `key` is not the key of such a report."""
    match = re.fullmatch(rf"{NIGHTS}([^/]+)\.report\.json", key)
    return None if match is None else match[1]


def lease_number(key: str) -> int | None:
    """Inverse of `lease_key`; None if `key` is not the key of a lease object."""
    match = re.fullmatch(rf"{LEASES}[^/]+/([1-9]\d*)\.json", key)
    return None if match is None else int(match[1])


def is_foreign_cache(key: str) -> bool:
    """Whether another reader (FastVideo, Megatron-Energon, litdata) wrote this object beside the data it read."""
    return _CACHES.fullmatch(key) is not None
