"""Several drivers over one output, each with its own part of the inputs (docs/operations.md): one latent set, one snapshot."""

from __future__ import annotations

import pipeline
from pipeline.config import StorageConfig
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests import forked_command
from tests.engine.test_inline import assert_same_rows
from tests.tiny_corpus import make_corpus, receipts, rows, tiny_flags, tiny_job, video_bytes


def test_two_drivers_at_once_over_disjoint_parts_give_the_rows_of_one_in_one_snapshot(tmp_path):
    corpus, output = make_corpus(tmp_path / "in", shards=4, samples=2), tmp_path / "out"
    for n in range(4):
        (corpus / f"{n}.mp4").write_bytes(video_bytes(9, seed=n))
    parts = (f"{corpus}/00000[01].tar", f"{corpus}/[01].mp4"), (f"{corpus}/00000[23].tar", f"{corpus}/[23].mp4")
    drivers = [forked_command.start("encode", *part, output, *tiny_flags("--executor", "inline")) for part in parts]
    for driver in drivers:
        _, stderr = driver.communicate(timeout=300)
        assert driver.returncode == 0, stderr

    pipeline.encode(tiny_job(corpus, tmp_path / "alone"))
    assert_same_rows(rows(tmp_path / "alone"), rows(output))
    covered = [source.uri for receipt in receipts(output) for source in receipt.shard.objects]
    assert len(covered) == len(set(covered)) == 8
    store = open_store(str(output), StorageConfig())
    published = publish(store, PublishOptions())
    assert (published.snapshot.number, published.snapshot.counts["rows"]) == (1, len(rows(output)))
    assert verify_output(store).ok
    # A run over everything finds nothing to do: the parts leave no trace in the output.
    assert pipeline.encode(tiny_job(corpus, output)).counts.samples == 0
