"""A real S3 server that is stopped during a real build, and started again."""

import os
import threading
import time

import pytest

from pipeline.config import StorageConfig
from pipeline.storage import open_store
from tests import forked_command
from tests.faulty_proxy import FaultyProxy
from tests.tiny_corpus import make_corpus, receipts, tiny_flags

pytestmark = pytest.mark.s3

AWAY_S = 8.0


class LeavingProxy(FaultyProxy):
    """Closes its port when the first receipt has passed, and opens it again after `AWAY_S`."""

    def __init__(self, target):
        super().__init__(target)
        self.returned = threading.Event()
        threading.Thread(target=self._go_away, daemon=True).start()

    def _go_away(self):
        while not any(method == "PUT" and "/_receipts/" in target for method, target in self.requests):
            time.sleep(0.02)
        self.turn_on("away")
        time.sleep(AWAY_S)
        self.turn_off("away")
        self.returned.set()


def test_short_outage_fails_no_shard(s3, tmp_path):
    corpus = make_corpus(tmp_path / "corpus", shards=6, samples=3)
    store = open_store(s3.root + "/in", StorageConfig())
    for path in sorted(corpus.iterdir()):
        store.upload(path, path.name)
    with LeavingProxy(s3.address) as proxy:
        command = ["encode", s3.root + "/in/*.tar", s3.root + "/out"]
        # A patience shorter than the outage: it is the build that waits.
        flags = tiny_flags("--executor", "inline", "--set", "storage.max_attempts=2", "--set", "engine.attempts=1")
        run = forked_command.run(*command, *flags, env={**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint})
        assert proxy.returned.is_set()
    assert run.returncode == 0, run.stderr
    assert "6 of 6 shards encoded" in run.stdout
    assert run.stderr.count("has not answered since") == 1, run.stderr
    assert run.stderr.count("answers again") == 1, run.stderr
    assert "attempt 1 of" not in run.stderr
    assert len(receipts(s3.root + "/out")) == 6
