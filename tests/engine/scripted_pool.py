"""Worker pool whose attempts end as a test says, over a real local store whose `probe` answers as a test says."""

import threading
import time

from pipeline.engine.driver.build import Build
from pipeline.engine.driver.progress import Silent
from pipeline.engine.driver.report import BuildReport
from pipeline.engine.worker.build_context import BuildContext
from pipeline.engine.worker.encode_loop import ShardFailure
from pipeline.engine.worker.pool import ShardEnded, WorkerUp
from pipeline.engine.worker.shard_result import ShardResult
from pipeline.errors import StorageUnavailable
from pipeline.format.layout import CURRENT
from pipeline.records import Counts, Shard, SourceObject, Timings
from pipeline.storage.local import LocalStore
from tests.tiny_corpus import tiny_job


class Notices(Silent):
    def __init__(self):
        self.lines = []

    def notice(self, text):
        self.lines.append(text)


class ProbedStore(LocalStore):
    """Answers probes unless it is down."""

    def __init__(self, root):
        super().__init__(root)
        self.down = False
        self.probes = 0
        self.thread_names = set()

    def probe(self):
        self.probes += 1
        self.thread_names.add(threading.current_thread().name)
        if self.down:
            raise StorageUnavailable("host:9000 did not answer (ConnectionRefused)", uri=self.root)


class ScriptedPool:
    """Workers whose attempts end with `outcome(shard, how often it ran)`: None for success, else an error."""

    def __init__(self, outcome, workers=2):
        self.size = workers
        self._outcome = outcome
        self._events = []
        self.runs = {}
        self.closed = False

    def start(self, wanted):
        self._events += [WorkerUp(f"w{n}") for n in range(wanted)]

    def assign(self, worker, shard, blamed=()):
        self.runs[shard.name] = self.runs.get(shard.name, 0) + 1
        error = self._outcome(shard, self.runs[shard.name])
        shard_id = shard.id("f" * 32)
        counts = Counts(samples=1, encoded=1, clips=1, frames=5)
        done = ShardResult(shard_id, True, counts, counts, Timings(), 10, {}, 1)
        self._events.append(ShardEnded(worker, done if error is None else ShardFailure(shard_id, error)))

    def poll(self, timeout_s):
        time.sleep(0.002 if self._events else 0.005)  # probes are answered meanwhile
        events, self._events = self._events, []
        return events

    def close(self):
        self.closed = True


class ScriptedExecutor:
    def __init__(self, pool):
        self._pool = pool

    def meters(self):
        return None

    def pool(self, context):
        return self._pool


def make_build(tmp_path, store, pool, *overrides, shards=6):
    job = tiny_job(tmp_path, tmp_path / "out", *overrides)
    context = object.__new__(BuildContext)
    object.__setattr__(context, "job", job)
    object.__setattr__(context, "fingerprint", "f" * 32)
    object.__setattr__(context, "layout", CURRENT)
    object.__setattr__(context, "build", "0123abcd")
    uri = str(tmp_path / "in")
    todo = [Shard("tar", f"s{n}", (SourceObject(f"{uri}/s{n}.tar", n + 1, "e"),)) for n in range(shards)]
    report = BuildReport(str(tmp_path), "f" * 32, "leanvae", True, "cpu", shards, 0)
    display = Notices()
    return Build(todo, context, ScriptedExecutor(pool), store, display, report, time.monotonic()), report, display.lines


def unavailable(shard):
    return StorageUnavailable("host:9000 did not answer (ConnectionRefused)", uri=shard.objects[0].uri)
