"""Thread that keeps the cache of receipt summaries up to date while a build runs, so that the next run reads few receipts.

Every `EVERY_S` it lists the receipts, reads those that the cache lacks and writes the cache again: a LIST for each 1,000 receipts, and a
GET for each new one. Without it, the run that follows a build of 100,000 shards would read as many receipts before it starts.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pipeline.errors import LatheError
from pipeline.ledger.summaries import Summaries
from pipeline.process.scratch import ScratchFolder, local_disk

if TYPE_CHECKING:
    from pipeline.format.layout import Layout
    from pipeline.storage import Store

EVERY_S = 600.0
CLOSE_S = 5.0  # for a refresh to end; the thread is a daemon, so that a store that hangs does not keep the process


class SummaryKeeper:
    """Context manager: refreshes from a thread of its own until it is left. `failure`: why the last refresh failed, if it did."""

    def __init__(self, store: Store, layout: Layout, every_s: float | None = None) -> None:
        self.failure: str | None = None
        self._store = store
        self._layout = layout
        self._every_s = EVERY_S if every_s is None else every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="summaries", daemon=True)

    def __enter__(self) -> SummaryKeeper:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                self._refresh()
                self.failure = None
            except LatheError as error:  # the build itself finds out whether the store is away
                self.failure = str(error)

    def _refresh(self) -> None:
        with ScratchFolder() as folder, local_disk(folder):
            summaries = Summaries(self._store, layout=self._layout)
            summaries.spool(folder / "summaries")
            summaries.save()
