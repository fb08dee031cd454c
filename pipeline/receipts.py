"""The ledger of an output: which shards are done, and which files that means. Readers trust receipts and nothing else.

Enters: a `Receipt` whose files are uploaded. Leaves: the receipt that counts for its shard: ours if it was first, else
the one that was.
`latentset.json` says what the folder is; `receipts/` holds one object a shard, so one LIST tells everything that is
done.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import BuildError, NotFound, OutputError
from pipeline.records import FORMAT_VERSION, Receipt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.storage import ObjectInfo, Store

SET_KEY = "latentset.json"
PREFIX = "receipts/"
# `{shard_id}.json`, or `{shard_id}--{attempt}.json` on stores that cannot refuse a second writer.
NAME = re.compile(r"receipts/(?P<shard>[0-9a-f]{32})(--(?P<attempt>[A-Za-z0-9_-]+))?\.json")


@dataclass(frozen=True, slots=True)
class LatentSet:
    """What `latentset.json` says."""

    name: str
    uuid: str
    created: str  # UTC, ISO 8601


class Ledger:
    """The receipts of one output. Holds no state, so any number may work on one output at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def prepare(self, name: str) -> list[str]:
        """Makes the output a latent set if it is none yet. Returns lines for the user, usually none.

        Raises:
            OutputError: the folder holds another format version, or something else under our names.
        """
        notices = []
        if not self._store.conditional_writes():
            notices.append(
                f"{self._store.root}: the store has no conditional writes; receipts are named by attempt, "
                "the earliest counts. Results are the same, but two runs at once may leave files for gc"
            )
        if not self._store.exists(SET_KEY):
            made = {
                "format": "latentset",
                "format_version": FORMAT_VERSION,
                "name": name,
                "uuid": str(uuid.uuid4()),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self._store.put_if_absent(SET_KEY, json.dumps(made, indent=1).encode())
        self.latent_set()  # ours, or that of whoever was first
        return notices

    def latent_set(self) -> LatentSet:
        """What the output says it is.

        Raises:
            OutputError: no latent set, one of another format version, or a foreign file of that name.
        """
        uri = self._store.uri(SET_KEY)
        try:
            raw = json.loads(self._store.read(SET_KEY))
        except NotFound:
            raise OutputError(f"{self._store.root} is no latent set: it has no {SET_KEY}") from None
        except ValueError as error:
            raise OutputError(
                f"{SET_KEY} is not JSON ({error}); expected the file Lathe writes. Choose another output", uri=uri
            ) from None
        if not isinstance(raw, dict) or raw.get("format") != "latentset":
            found = f"keys {sorted(raw)[:8]}" if isinstance(raw, dict) else type(raw).__name__
            raise OutputError(f"{SET_KEY} is not Lathe's: found {found}. Choose another output", uri=uri)
        if raw.get("format_version") != FORMAT_VERSION:
            raise OutputError(
                f"the output holds format version {raw.get('format_version')!r}, this Lathe writes {FORMAT_VERSION}. "
                "Choose another output or the Lathe that made it",
                uri=uri,
            )
        return LatentSet(str(raw.get("name")), str(raw.get("uuid")), str(raw.get("created")))

    def done(self) -> set[str]:
        """Ids of all shards that have a receipt, by one LIST and no reads."""
        return {match["shard"] for info in self._store.list(PREFIX) if (match := NAME.fullmatch(info.key))}

    def commit(self, receipt: Receipt) -> Receipt:
        """Makes `receipt` the shard's, unless it has one. Returns the one that counts: if its `attempt` is another,
        delete your files.

        Raises:
            BuildError: the receipt's books do not balance; nothing was written.
        """
        if problems := imbalances(receipt):
            raise BuildError(f"receipt refused, {problems[0]}", shard=receipt.shard_id, stage="commit")
        if not self._store.conditional_writes():
            return self._commit_by_name(receipt)
        key = f"{PREFIX}{receipt.shard_id}.json"
        self._store.put_if_absent(key, receipt.to_json())
        # Read back whatever the answer was: some stores know If-None-Match but do not settle a race with it.
        return self.load(key)

    def _commit_by_name(self, receipt: Receipt) -> Receipt:
        ours = f"{PREFIX}{receipt.shard_id}--{receipt.attempt}.json"
        self._store.write(ours, receipt.to_json())
        winner = self.read(receipt.shard_id)
        if winner is None:
            raise BuildError(
                "the receipt just written is not listed by the store", shard=receipt.shard_id, stage="commit"
            )
        if winner.attempt != receipt.attempt:
            self._store.delete(ours)  # before the caller deletes the files it names
        return winner

    def read(self, shard_id: str) -> Receipt | None:
        """The receipt that counts for a shard; None if it is not done. One GET, or a LIST without conditional writes.

        Raises:
            OutputError: a receipt that cannot be read.
        """
        if self._store.conditional_writes():
            try:
                return self.load(f"{PREFIX}{shard_id}.json")
            except NotFound:
                return None
        keys = [info.key for info in self._store.list(f"{PREFIX}{shard_id}") if NAME.fullmatch(info.key)]
        return self.load_first(keys) if keys else None

    def all(self, workers: int = 8) -> Iterator[Receipt]:
        """Every receipt that counts, by shard id; read ahead by `workers` threads.

        Raises:
            OutputError: a receipt that cannot be read.
        """
        with ThreadPoolExecutor(workers, thread_name_prefix="receipts") as pool:
            pending: deque[Any] = deque()
            for keys in self.keys_by_shard().values():
                pending.append(pool.submit(self.load_first, keys))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def keys_by_shard(self) -> dict[str, list[str]]:
        """Receipt keys of every shard, by shard id. More than one only where the store has no conditional writes."""
        found: dict[str, list[str]] = {}
        for info in self._store.list(PREFIX):
            if match := NAME.fullmatch(info.key):
                found.setdefault(match["shard"], []).append(info.key)
        return found

    def load_first(self, keys: Iterable[str]) -> Receipt:
        """Of several receipts of one shard, the one that counts: the lowest (created, attempt), the same for every
        reader.
        """
        return min((self.load(key) for key in keys), key=lambda receipt: (receipt.created, receipt.attempt))

    def load(self, key: str) -> Receipt:
        """One receipt object.

        Raises:
            OutputError: damaged, of another format version, or of another shard than its name says.
        """
        try:
            receipt = Receipt.from_json(self._store.read(key))
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{key} cannot be read as a receipt: {error}", uri=self._store.uri(key)) from None
        match = NAME.fullmatch(key)
        if match is None or match["shard"] != receipt.shard_id or match["attempt"] not in (None, receipt.attempt):
            raise OutputError(
                f"{key} holds the receipt of shard {receipt.shard_id}, attempt {receipt.attempt}",
                uri=self._store.uri(key),
            )
        return receipt


def imbalances(receipt: Receipt) -> list[str]:
    """What does not add up in a receipt, worst first; empty when its counts, files, rejects and statistics agree."""
    counts, files = receipt.counts, receipt.files
    found = []
    try:
        counts.check()
    except ValueError as error:
        found.append(str(error))
    if (rows := sum(item.rows for item in files)) != counts.clips:
        found.append(f"files hold {rows} rows, counts say {counts.clips} clips")
    if (frames := sum(item.frames for item in files)) != counts.frames:
        found.append(f"files hold {frames} frames, counts say {counts.frames}")
    if counts.encoded > counts.clips:
        found.append(f"{counts.encoded} samples encoded, but only {counts.clips} clips")
    if len(receipt.rejects) < counts.rejected:
        found.append(f"{counts.rejected} samples rejected, but only {len(receipt.rejects)} rejects give a reason")
    keys = [key for item in files for key in (item.key, item.index_key)]
    if len(set(keys)) != len(keys):
        found.append("a file is named twice")
    if (receipt.stats is None) != (counts.clips == 0):
        found.append(f"{counts.clips} clips with{'out' if receipt.stats is None else ''} statistics")
    return found


def orphans(store: Store) -> Iterator[ObjectInfo]:
    """Objects under `data/` and `index/` that no receipt names: work in progress, or what killed attempts left.

    Lists data before it reads receipts, so a shard committed meanwhile is not called an orphan. Delete only after a
    grace time.
    """
    listed = [info for prefix in ("data/", "index/") for info in store.list(prefix)]
    named = {key for receipt in Ledger(store).all() for item in receipt.files for key in (item.key, item.index_key)}
    yield from (info for info in listed if info.key not in named)
