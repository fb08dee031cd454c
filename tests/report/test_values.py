"""Values of a report against the snapshot, its receipts and rows; takedowns; samples of large snapshots; errors."""

import json

import numpy as np
import pytest

from pipeline.config import StorageConfig
from pipeline.errors import ConfigError, InputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.report import left_out, row_sample
from pipeline.report.collect import ReportOptions, collect
from pipeline.report.page import page_of
from tests.operate.outputs import files_of
from tests.pipeline.latent_clips import FINGERPRINT, SMALL, latent_values, local_store
from tests.pipeline.published import add_shards, publish_all
from tests.report.conftest import WITHOUT_PICTURES
from tests.report.outputs import HOSTILE, add_shard, publish, source


def test_numbers_are_those_of_the_snapshot(report, hostile):
    snapshot = Snapshots(hostile).read(2)
    assert (report.snapshot, report.counts, report.buckets) == (2, snapshot.counts, snapshot.buckets)
    assert [check["name"] for check in report.checks] == [check.name for check in snapshot.checks]
    assert report.seconds == pytest.approx(10 * 17 / 8)  # 10 clips of 17 frames at 8 frames/s
    assert report.seconds_exact
    (network,) = report.networks
    assert (network.fingerprint, network.name, network.rows) == (FINGERPRINT, "tiny", 10)
    assert (report.cost.receipts, report.cost.receipts_read, report.cost.core_s) == (2, 2, 2.0)
    assert json.loads(json.dumps(report.to_dict()))["format"] == "lathe-report"


def test_rejects_have_counts_kinds_stages_and_examples(report):
    found = {item.reason: item for item in report.left_out.reasons}
    assert {name: (item.count, item.policy, item.stages) for name, item in found.items()} == {
        "too_short": (2, True, ("clips",)),
        "undecodable": (2, False, ("decode",)),
    }
    assert found["too_short"].share == pytest.approx(2 / 14)
    assert {(item.uri, item.key) for item in found["too_short"].examples} == {
        (source(0), "short-0"),
        (source(1), "short-1"),
    }
    assert [(item.uri, item.rejects, item.samples) for item in report.left_out.sources] == [
        (source(0), 2, 10),
        (source(1), 2, 4),
    ]
    assert report.left_out.without_caption == 1


def test_source_videos_are_counted_all_against_encoded(report):
    videos = report.left_out.videos
    assert (videos.encoded, videos.rejected, videos.encoded_s, videos.rejected_s) == (10, 2, 200.0, 0.6)
    lengths, sizes = videos.histograms
    assert lengths.labels == ("0 s", "1 s", "2 s", "5 s", "10 s", "20 s")
    assert lengths.series == {"all inputs": (2, 0, 0, 0, 0, 10), "encoded": (0, 0, 0, 0, 0, 10)}
    assert (sizes.labels, sizes.series) == (("480",), {"all inputs": (12,), "encoded": (10,)})
    (loss,) = report.left_out.losses
    assert (loss.bucket, loss.rows, loss.lost, loss.refused) == (SMALL.name, 10, 0, 2)
    assert loss.share == pytest.approx(2 / 12)


def test_receipts_that_do_not_count_source_videos_are_said_to(tmp_path):
    store = local_store(tmp_path / "out")
    add_shards(store, tmp_path, range(1))
    publish_all(store)
    report, pictures = collect_of(store)
    assert (report.left_out.videos, report.left_out.losses) == (None, ())
    assert b"Length and size of the source videos are not recorded" in page_of(report, pictures)
    add_shard(store, tmp_path, 1, ("kept",))
    publish(store)
    report, pictures = collect_of(store)
    assert report.left_out.videos.encoded == 1
    assert b"for 2 of 3 encoded inputs, by an earlier version" in page_of(report, pictures)


def test_rows_are_all_there_and_captions_are_cut(report):
    at = report.rows.columns.index
    assert (report.rows.total, len(report.rows.cells), report.rows.sampled) == (10, 10, False)
    captions = [row[at("caption")] for row in report.rows.cells]
    assert set(HOSTILE) - {None} < set(captions)
    assert max(len(caption or "") for caption in captions) == 160
    assert len(json.dumps(report.to_dict())) < 100_000
    assert {row[at("source size, px")] for row in report.rows.cells} == {"640x480"}
    heights, rates, lengths = report.rows.histograms
    assert dict(zip(heights.labels, heights.series["source"], strict=True)) == {"64": 0, "480": 10}
    assert dict(zip(rates.labels, rates.series["stored"], strict=True)) == {"8": 10, "29.97": 0}
    assert lengths.series["stored"] == (10,)


def test_statistics_are_exact_and_beside_the_parents(report):
    (channels,) = report.channels
    values = np.concatenate([latent_values(seed).reshape(4, -1) for seed in (*range(8), 100, 101)], axis=1)
    before = np.concatenate([latent_values(seed).reshape(4, -1) for seed in range(8)], axis=1)
    assert channels.exact["mean"] == pytest.approx(values.mean(1).tolist(), abs=2e-3)
    assert channels.parent["std"] == pytest.approx(before.std(1).tolist(), abs=2e-3)
    assert channels.constants["scale"] == 0.5
    assert [sum(counts) for counts in channels.histograms] == [values.shape[1]] * 4


def test_changes_are_counted_against_the_parent_and_listed_against_another(hostile):
    found, _ = collect(hostile, 2, StorageConfig(), ReportOptions(clips=0, against=1))
    assert (found.changes.parent, found.changes.counts["rows_added"]) == (1, 2)
    assert found.changes.against["sources"]["added"] == {"count": 1, "first": [source(1)]}
    assert [item["number"] for item in found.changes.ancestors] == [2, 1]


def test_what_was_taken_down_is_not_named(tmp_path):
    store = local_store(tmp_path / "out")
    add_shard(store, tmp_path, 0, ("kept", "secret"))
    publish(store)
    record_takedown(store, "asked", samples=[(source(0), "dir/video00001"), (source(0), "short-0")])
    text = json.dumps(collect(store, None, StorageConfig(), WITHOUT_PICTURES)[0].to_dict())
    assert "kept" in text
    assert "secret" not in text
    assert "video00001" not in text
    assert "short-0" not in text
    assert "1 takedowns were recorded since" in text


def test_a_snapshot_whose_files_were_deleted_by_a_takedown_is_reported_without_them(tmp_path):
    store = local_store(tmp_path / "out")
    for number in range(2):
        add_shard(store, tmp_path, number, ("kept", "secret"))
    publish(store)
    record_takedown(store, "asked", sources=[source(0)])
    for key in files_of(receipt_of(store, 0)):  # as gc may have done it before the newest snapshot could name others
        store.delete(key)
    found = collect_of(store)[0]
    assert {row[-1] for row in found.rows.cells} == {source(1)}
    assert (found.counts["rows"], found.rows.total) == (4, 4)
    assert found.networks[0].spec["network"] == "tiny"
    assert found.channels[0].clips == 2


def test_rows_of_tars_have_their_scalars(tmp_path, monkeypatch):
    store = local_store(tmp_path / "out")
    add_shard(store, tmp_path, 0, ("one", None, "three"), format="tar")
    publish(store)
    found = collect_of(store)[0].rows
    assert {row[found.columns.index("codec")] for row in found.cells} == {"h264"}
    assert found.without_caption == 1
    monkeypatch.setattr(row_sample, "TAR_ROWS", 2)
    few = collect_of(store)[0].rows
    assert [row[few.columns.index("codec")] for row in few.cells] == ["h264", "h264", None]
    assert sum(few.histograms[0].series["source"]) == 2


def test_a_large_snapshot_is_sampled_and_says_so(tmp_path, monkeypatch):
    store = local_store(tmp_path / "out")
    add_shards(store, tmp_path, range(6))
    publish_all(store)
    monkeypatch.setattr(row_sample, "MOST_ROWS", 5)
    monkeypatch.setattr(row_sample, "MOST_FILES", 3)
    monkeypatch.setattr(left_out, "MOST_RECEIPTS", 4)
    found, _ = collect(store, None, StorageConfig(), WITHOUT_PICTURES)
    assert (found.rows.total, len(found.rows.cells), found.rows.sampled) == (12, 5, True)
    assert (found.rows.files_read, found.rows.files) == (3, 6)
    assert len({row[-1] for row in found.rows.cells}) == 3  # from all files that were read
    assert (found.cost.receipts_read, found.cost.receipts, found.cost.core_s) == (4, 6, 6.0)
    assert "4 of 6 receipts were read" in found.notices[0]


def test_what_cannot_be_reported_is_an_error_that_says_so(hostile, tmp_path):
    empty = local_store(tmp_path / "out")
    Ledger(empty).prepare("films")
    with pytest.raises(InputError, match="has no snapshot; run `lathe publish"):
        collect_of(empty)
    with pytest.raises(InputError, match="has no snapshot 7; there are 1, 2"):
        collect_of(hostile, 7)
    with pytest.raises(InputError, match="has no snapshot 9"):
        collect_of(hostile, None, against=9)
    with pytest.raises(ConfigError, match="--clips: expected at least 0, got -1"):
        collect_of(hostile, None, clips=-1)


def receipt_of(store, number):
    (found,) = (item for item in Ledger(store).all() if item.shard.objects[0].uri == source(number))
    return found


def collect_of(store, number=None, **options):
    return collect(store, number, StorageConfig(), ReportOptions(**{"clips": 0, **options}))
