"""A build whose workers' nodes go away, and one whose node is avoided: what it tells its pool, and what it counts."""

from pipeline.engine.worker.encode_loop import ShardFailure
from pipeline.engine.worker.pool import NodeAvoided, ShardEnded, WorkerDraining, WorkerGone
from pipeline.errors import HandedBack, WorkerLost
from pipeline.format.layout import CURRENT
from pipeline.operate.run_logs import events, run_logs
from tests.engine.scripted_pool import ProbedStore, ScriptedPool, make_build


class DrainedPool(ScriptedPool):
    """The node of the first worker goes away while it holds shards; attempts there end only when they are asked for a second time."""

    def __init__(self):
        super().__init__(lambda shard, run: None)
        self.held, self.back, self.asked = {}, [], set()

    def assign(self, worker, shard, blamed=()):
        if worker != "w0":
            super().assign(worker, shard)
            return
        assert not self.back, "a shard was given to a worker whose node goes away"
        self.held[shard.id("f" * 32)] = shard
        self._events.append(WorkerDraining("w0", 9.0))

    def hand_back(self, worker, shard_ids):
        assert worker == "w0"
        if not self.asked.issuperset(shard_ids):
            self.asked.update(shard_ids)
            self._events.append(WorkerDraining("w0", 9.0))
            return
        for shard_id in shard_ids:
            if self.held.pop(shard_id, None) is not None:
                self.back.append(shard_id)
                self._events.append(ShardEnded("w0", ShardFailure(shard_id, HandedBack("handed back"))))
        if not self.held:
            self._events.append(WorkerGone("w0", WorkerLost("w0 left its node"), "preempted"))


def test_shards_of_a_node_that_goes_away_are_done_by_others_and_nothing_is_counted(tmp_path):
    pool = DrainedPool()
    store = ProbedStore(str(tmp_path / "out"))
    build, report, lines = make_build(tmp_path, store, pool, "engine.attempts=1")
    build.run()
    assert report.shards_done == 6
    assert report.failed == {}
    assert len(pool.back) == 2  # its credit
    assert sum("handed back: its node goes away in 9 s" in line for line in lines) == 2
    (keys,) = run_logs(store, CURRENT).values()
    assert [event["event"] for event in events(store, keys)].count("handed_back") == 2


def test_avoided_node_is_told_and_its_deaths_blame_no_video(tmp_path, monkeypatch):
    pool = ScriptedPool(lambda shard, run: None)
    pool._events.append(NodeAvoided("node-7", "node gpu-7 gets no encoder for 30 minutes"))
    build, _, lines = make_build(tmp_path, ProbedStore(str(tmp_path / "out")), pool)
    forgiven = []
    monkeypatch.setattr(build._dispatcher._videos, "forgive", forgiven.append)
    build.run()
    assert forgiven == ["node-7"]
    assert "node gpu-7 gets no encoder for 30 minutes" in lines
