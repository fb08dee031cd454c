"""Places of a report: a local file with `report.json` beside it, or objects of the output beside the record of the snapshot.

A page names inputs and shows pictures. `stored_page` gives none that is older than a takedown; `lathe gc` deletes such pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import NotFound, OutputError
from pipeline.format.layout import TAKEDOWNS, snapshot_page_key, snapshot_values_key
from pipeline.report.collect import ReportOptions, collect
from pipeline.report.page import page_of
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from pipeline.config import StorageConfig
    from pipeline.report.pictures import Pictures
    from pipeline.report.values import Report
    from pipeline.storage import Store


def page_path(name: str) -> Path:
    """Path of a page that may be written, checked before anything is read.

    Raises:
        OutputError: not a local `.html` file in a folder that exists.
    """
    if is_remote(name) or not name.lower().endswith(".html"):
        raise OutputError(
            f"--html {name}: expected a local file whose name ends in .html; --store keeps it in the output"
        )
    path = Path(name).absolute()
    if not path.parent.is_dir():
        raise OutputError(f"--html {name}: its folder does not exist; make it, or name another file")
    return path


def write_report(report: Report, pictures: Pictures, path: Path, *, assets: bool = False) -> Path:
    """Writes the page to `path`, and its values beside it with the suffix `.json`; returns the path of the values. `assets`: pictures go to
    a folder beside the page.

    Raises:
        OutputError: a file cannot be written.
    """
    values = path.with_suffix(".json")
    folder = path.with_name(f"{path.stem}_files")
    try:
        if assets:
            folder.mkdir(exist_ok=True)
            for name, data in pictures.by_name.items():
                (folder / f"{name}.webp").write_bytes(data)
        path.write_bytes(page_of(report, pictures, assets=folder.name if assets else None))
        values.write_bytes(values_of(report))
    except OSError as error:
        raise OutputError(f"--html {path}: cannot be written: {error.strerror}; name another file") from error
    return values


def values_of(report: Report) -> bytes:
    """`report.json`."""
    return json.dumps(report.to_dict(), indent=1, allow_nan=False).encode()


def store_report(store: Store, report: Report, pictures: Pictures) -> str:
    """Writes page and values into the output; replaces earlier ones. Returns the URI of the page."""
    key = snapshot_page_key(report.snapshot)
    store.write(snapshot_values_key(report.snapshot), values_of(report))
    store.write(key, page_of(report, pictures))
    return store.uri(key)


def make_stored_report(
    store: Store, number: int | None, storage: StorageConfig, *, checkpoint: str | None = None, device: str = "auto"
) -> str:
    """Makes the report of a snapshot and stores it. Returns the URI of the page. Raises as `collect` and `store_report`."""
    return store_report(store, *collect(store, number, storage, ReportOptions(checkpoint=checkpoint, device=device)))


def takedown_keys(store: Store) -> frozenset[str]:
    """Keys of all takedowns and of what undoes them."""
    return frozenset(store.keys(TAKEDOWNS))


def stored_page(store: Store, number: int) -> bytes | None:
    """The page that is stored for a snapshot; None without one, and if a takedown or the undoing of one is newer."""
    try:
        made = store.stat(snapshot_page_key(number)).modified
        if any(info.modified >= made for info in store.list(TAKEDOWNS)):
            return None
        return store.read(snapshot_page_key(number))
    except NotFound:
        return None
