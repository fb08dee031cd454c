"""Corpus on an S3 server, rows of a clean run, environment of commands, and what must hold at the end."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow.parquet as pq

import pipeline
from pipeline.engine.decoders.crash_report import PREFIX as CRASH_REPORT
from pipeline.format.index import read_index
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import read_takedowns
from pipeline.loader import LatentDataset
from pipeline.operate.verify import verify_output
from pipeline.storage import Store, open_store
from tests import forked_command
from tests.tiny_corpus import make_corpus, tiny_flags, tiny_job, video_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.conftest import S3Server

SHARDS, SAMPLES, FILMS = 2, 3, 2
GONE_LIMIT_S = 240.0  # for processes that were killed to be gone
MARK = "LATHE_CHAOS"  # in the environment of every process that a command starts
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Ground:
    """`server` has the corpus below `inputs`. `clean`: rows of a clean run, by id. `taken`: key of a sample that is taken down."""

    server: S3Server
    inputs: str
    clean: Rows
    taken: str

    @property
    def kept(self) -> Rows:
        """Rows that are left after the takedown."""
        return {name: row for name, row in self.clean.items() if row["source_key"] != self.taken}

    def output(self) -> str:
        """URI of a fresh output."""
        return f"{self.server.root}/out-{uuid.uuid4().hex[:8]}"

    def store(self, uri: str) -> Store:
        """The output, past any relay."""
        return open_store(uri, self.server.config())


def make_ground(server: S3Server, folder: Path) -> Ground:
    """Uploads tars and plain films and encodes them undisturbed."""
    corpus = make_corpus(folder / "corpus", shards=SHARDS, samples=SAMPLES)
    for number in range(FILMS):
        (corpus / f"film{number}.mp4").write_bytes(video_bytes(9 + 4 * number, seed=90 + number))
    inputs = open_store(f"{server.root}/in", server.config())
    for path in sorted(corpus.iterdir()):
        inputs.upload(path, path.name)
    output = f"{server.root}/clean"
    pipeline.encode(tiny_job(f"{server.root}/in", output, **{"storage.endpoint_url": server.endpoint}))
    store = open_store(output, server.config())
    clean = {
        row["id"]: row for key in store.keys("data/") for row in pq.read_table(io.BytesIO(store.read(key))).to_pylist()
    }
    return Ground(server, f"{server.root}/in", clean, "000000")


class Place:
    """Temporary folder and environment of the commands of one life. At the end of its block nothing may be left of them."""

    def __init__(self, ground: Ground, endpoint: str) -> None:
        self._mark = uuid.uuid4().hex
        self.limit_s = GONE_LIMIT_S
        self._shared = set(os.listdir("/dev/shm"))
        self.temporary = Path(tempfile.mkdtemp(prefix="lc", dir="/tmp"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            **ground.server.environment(),
            "AWS_ENDPOINT_URL": endpoint,
            "TMPDIR": str(self.temporary),
            MARK: self._mark,
        }

    def start(self, *arguments: str, endpoint: str | None = None) -> forked_command.ForkedCommand:
        """A running `lathe` command. What it prints goes to a file, which `printed` reads. `endpoint`: instead of the place's."""
        environment = self.environment if endpoint is None else {**self.environment, "AWS_ENDPOINT_URL": endpoint}
        with (self.temporary.parent / f"{self.temporary.name}.log").open("ab") as log:
            return forked_command.start(*arguments, env=environment, stdout=log.fileno(), stderr=log.fileno())

    def printed(self) -> str:
        """What the commands have printed so far."""
        return (self.temporary.parent / f"{self.temporary.name}.log").read_text()

    def processes(self) -> list[psutil.Process]:
        """Those that commands of this place started and that live."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # of another user, or gone
                continue
        return found

    def left(self) -> dict[str, list[str]]:
        """What is there now and should not be."""
        found = {
            "processes": [" ".join(process.cmdline())[:100] for process in self.processes()],
            # Of Ray: its workers report a crash in a file that their driver takes; of a node that died, the next encoder there deletes it.
            # pymp-: sockets of Python's multiprocessing in Ray's own processes, which are killed with their cluster.
            "temporary": sorted(
                path.name for path in self.temporary.iterdir() if not path.name.startswith((CRASH_REPORT, "pymp-"))
            ),
            "shared memory": sorted(set(os.listdir("/dev/shm")) - self._shared),
        }
        return {name: values for name, values in found.items() if values}

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the folder.

        Raises:
            AssertionError: a process, temporary file or shared memory is left, unless the block has failed anyway.
        """
        deadline = time.monotonic() + (self.limit_s if kind is None else 0.0)
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it has ended
                process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)
        (self.temporary.parent / f"{self.temporary.name}.log").unlink(missing_ok=True)
        assert left == {} or kind is not None, left


def encode_arguments(ground: Ground, output: str, *flags: str) -> list[str]:
    """Of the build of the corpus: tars are a shard each, films together one."""
    return ["encode", ground.inputs, output, *tiny_flags(*(flags or ("--executor", "inline")))]


def plain(rows: Rows) -> dict[str, tuple[Any, ...]]:
    """Rows to compare: all columns, latents as their hash."""
    found = {}
    for name, row in rows.items():
        digest = hashlib.sha256(row["vae_latent_bytes"]).hexdigest()
        found[name] = (*((key, value) for key, value in sorted(row.items()) if key != "vae_latent_bytes"), digest)
    return found


def published(store: Store) -> Rows:
    """Rows of the newest snapshot by its tables, indexes and data files. An id that occurs twice fails."""
    snapshots, takedowns = Snapshots(store), read_takedowns(store)
    found: Rows = {}
    for file in snapshots.table(snapshots.latest(), "files").to_pylist():
        index = read_index(store.read(file["index_key"]))[0]
        stored = pq.read_table(io.BytesIO(store.read(file["key"]))).to_pylist()
        for entry in index:
            if entry.row not in file["hidden"] and not takedowns.hides(entry):
                assert entry.id not in found, f"row {entry.id} is there twice"
                found[entry.id] = stored[entry.row]
    return found


def assert_published(store: Store, expected: Rows) -> None:
    """The newest snapshot has these rows and no others, all columns and tensors."""
    rows, wanted = plain(published(store)), plain(expected)
    assert rows == wanted, f"published {_difference(rows, wanted)}"


def assert_readers_see(ground: Ground, output: str, expected: Rows) -> None:
    """The loader shows these rows and no others; `verify` finds that each has its recorded hash and the Delta view is right."""
    store = ground.store(output)
    dataset = LatentDataset.open(output, storage=ground.server.config())
    try:
        seen = [row.id for row in dataset.rows()]
    finally:
        dataset.close()
    assert sorted(seen) == sorted(expected), f"loaded {_difference(Counter(seen), Counter(list(expected)))}"
    newest = Snapshots(store).latest().number
    for report in (verify_output(store), verify_output(store, snapshot=newest)):
        assert report.problems == []


def _difference(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return f"too many: {sorted(found.keys() - wanted.keys())}, lost: {sorted(wanted.keys() - found.keys())}, other: {other}"


def stored_files(store: Store) -> set[str]:
    """Keys of data files and indexes."""
    return {key for prefix in ("data/", "_index/") for key in store.keys(prefix) if "_delta_log" not in key}


def named_files(store: Store) -> set[str]:
    """Keys of data files and indexes that the newest snapshot names."""
    snapshots = Snapshots(store)
    table = snapshots.table(snapshots.latest(), "files", ["key", "index_key"]).to_pydict()
    return {*table["key"], *table["index_key"]}
