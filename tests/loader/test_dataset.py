"""Datasets: rows of a snapshot that count, their tensors bit by bit, filters, takedowns, what is refused."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import pipeline
from pipeline.config import WriteConfig
from pipeline.errors import ConfigError, InputError, OutputError
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import record_takedown
from pipeline.ledger.totals import tally
from pipeline.loader import dataset as dataset_module
from pipeline.loader.dataset import LatentDataset
from pipeline.operate.compact import compact
from tests.loader.outputs import SHORT, WHOLE, clip_of, commit_files, mixed_shards, write_output
from tests.pipeline.latent_clips import local_store, values_of

BUCKETS = {"1x32x24": 12, "9x32x24": 18, "9x32x40": 15}


def same_values(tensor, array, dtype):
    return np.array_equal(tensor.float().numpy(), values_of(array, dtype))


@pytest.mark.parametrize("name", ["parquet", "moments", "tar", "tar_moments"])
def test_rows_are_the_clips_that_were_written(films, name):
    output = films[name]
    dataset = LatentDataset.open(output.uri, columns=("fps", "metadata"))
    rows = list(dataset)
    assert len(rows) == len(dataset) == 45
    assert dataset.buckets == BUCKETS
    assert Counter(row.bucket for row in rows) == BUCKETS
    for row in rows:
        clip = output.clips[row.id]
        assert row.latent.dtype == getattr(torch, dataset.spec.dtype)
        assert same_values(row.latent, clip.latent_CTHW, dataset.spec.dtype)
        assert (row.logvar is None) == (clip.logvar_CTHW is None)
        assert row.logvar is None or same_values(row.logvar, clip.logvar_CTHW, dataset.spec.dtype)
        assert (row.caption, row.num_frames) == (clip.sample.caption, clip.num_frames)
        assert row.columns == {"fps": 8.0, "metadata": clip.sample.metadata}
    assert [row.id for row in dataset.rows(tensors=False)] == [row.id for row in rows]


def test_the_spec_is_that_of_the_network(films):
    spec = LatentDataset.open(films["moments"].uri).spec
    assert (spec.network, spec.latent_channels, spec.dtype, spec.moments) == ("tiny", 4, "bfloat16", True)
    assert (spec.scale, spec.shift, spec.mean, spec.normalised) == (0.5, 0.1, None, False)


def test_a_row_is_found_by_its_id_also_in_a_copy_of_the_dataset(films):
    dataset = pickle.loads(pickle.dumps(LatentDataset.open(films["parquet"].uri)))  # noqa: S301 - our own bytes
    row = dataset.row("video00105-0000")
    assert same_values(row.latent, films["parquet"].clips[row.id].latent_CTHW, "float16")
    with pytest.raises(InputError, match=r"has no row 'nothing' in this dataset"):
        dataset.row("nothing")
    with pytest.raises(ConfigError, match=r"row: expected the id of a row, a str, got 5; rows by number: as_map"):
        dataset.row(5)


def test_the_package_names_it():
    assert pipeline.LatentDataset is LatentDataset


def test_whole_videos_are_sorted_by_their_length(tmp_path):
    lengths = [5, 9, 9, 13, 5, 9]
    shard = [clip_of(n, WHOLE, frames) for n, frames in enumerate(lengths)] + [clip_of(6, SHORT)]
    dataset = LatentDataset.open(write_output(tmp_path / "out", tmp_path, [shard]).uri)
    assert dataset.buckets == {"5x32x24": 2, "9x32x24": 4, "13x32x24": 1}
    assert dataset.places["13x32x24"].grid == (4, 4, 3)
    rows = {row.id: row for row in dataset}
    assert [rows[f"video{n:05d}-0000"].latent.shape[1] for n in range(7)] == [2, 3, 3, 4, 2, 3, 3]


# ---- which rows count --------------------------------------------------------------------------------------------------


def test_frames_of_whole_videos_are_read_by_as_many_threads_as_asked(tmp_path, monkeypatch):
    output, counts = write_output(tmp_path / "out", tmp_path, [[clip_of(n, WHOLE, num_frames=9)] for n in range(3)]), []
    made = dataset_module.threads
    monkeypatch.setattr(dataset_module, "threads", lambda count, name: counts.append(count) or made(count, name))
    assert len(LatentDataset.open(output.uri, threads=3)) == 3
    assert counts == [3]


def test_rows_taken_down_are_left_out_of_old_snapshots_too(tmp_path):
    output = write_output(tmp_path / "out", tmp_path, mixed_shards())
    before = LatentDataset.open(output.uri)
    gone = "video00105-0000"
    record_takedown(output.store, "asked", ids=[gone])
    record_takedown(output.store, "asked", samples=[("s3://corpus/shard-002.tar", "dir/video00200")])
    dataset = LatentDataset.open(f"{output.uri}@1")
    left = {row.id for row in dataset}
    assert len(dataset) == len(left) == 43
    assert not {gone, "video00200-0000"} & left
    with pytest.raises(InputError, match="taken down"):
        dataset.row(gone)
    assert dataset.identity == before.identity  # the order of a run that is under way does not change
    assert dataset.buckets == BUCKETS
    write_output(tmp_path / "out", tmp_path, mixed_shards(1), first=7)
    again = LatentDataset.open(output.uri)
    assert (again.snapshot, len(again), sum(again.buckets.values())) == (2, len(list(again)), len(again))
    assert gone not in {row.id for row in again}


def test_rows_of_a_source_that_was_encoded_twice_count_once(tmp_path):
    """Retries and second runs leave files of which some rows are hidden; receipts say the same as the snapshot."""
    output = write_output(tmp_path / "out", tmp_path, mixed_shards(), publishing=False)
    with pytest.raises(InputError, match=r"has no snapshot; run `lathe publish"):
        LatentDataset.open(output.uri)
    received = LatentDataset.open(output.uri, receipts=True)
    assert received.snapshot is None
    assert {row.id for row in received} == set(output.clips)
    record_takedown(output.store, "asked", ids=["video00007-0000", "video00101-0000"])
    published = write_output(output.uri, tmp_path, [])
    for dataset in (LatentDataset.open(published.uri), LatentDataset.open(output.uri, receipts=True)):
        assert len(dataset.files.hidden) == 2
        assert {row.id for row in dataset} == set(output.clips) - {"video00007-0000", "video00101-0000"}
        for bucket in dataset.places.values():
            numbers, positions = bucket.locate(np.arange(len(bucket)))
            found = {dataset.indexes.get(file).text("id", row) for file, row in zip(numbers, positions, strict=True)}
            assert found <= {row.id for row in dataset}
            assert len(found) == len(bucket)


@pytest.fixture
def after_summaries(monkeypatch):
    """Calls a function once, when the summaries of receipts have been read: what a writer does meanwhile."""
    original, waiting = Summaries.all, []

    def all_and_then(self, *arguments):
        found = original(self, *arguments)
        if waiting:
            waiting.pop()()
        return found

    monkeypatch.setattr(Summaries, "all", all_and_then)
    return waiting.append


def names_of(*numbers):
    return [f"video{number:05d}-0000" for number in numbers]


def test_a_receipt_that_comes_while_receipts_are_read_doubles_no_row(tmp_path, after_summaries):
    output = write_output(tmp_path / "out", tmp_path, [], publishing=False)
    commit_files(output.store, tmp_path, [0, 1, 2], shard=0)

    def encoded_again():
        commit_files(output.store, tmp_path, [2, 3], shard=1)

    after_summaries(encoded_again)
    assert sorted(row.id for row in LatentDataset.open(output.uri, receipts=True)) == names_of(0, 1, 2)
    assert sorted(row.id for row in LatentDataset.open(output.uri, receipts=True)) == names_of(0, 1, 2, 3)
    after_summaries(lambda: commit_files(output.store, tmp_path, [0, 4], shard=2))
    assert [item.counts.clips for item in tally(output.store).values()] == [4]
    assert [item.counts.clips for item in tally(output.store).values()] == [5]


def test_a_compaction_that_comes_while_receipts_are_read_changes_no_row(tmp_path, after_summaries):
    shards = [[clip_of(100 * shard + n, SHORT) for n in range(3)] for shard in range(4)]
    output = write_output(tmp_path / "out", tmp_path, shards)
    after_summaries(lambda: compact(output.store))
    for files in (4, 1):
        dataset = LatentDataset.open(output.uri, receipts=True)
        assert len(dataset.files) == files
        assert sorted(row.id for row in dataset) == sorted(output.clips)


@pytest.mark.parametrize("receipts", [False, True])
def test_takedowns_count_in_files_that_a_later_compaction_replaced(tmp_path, receipts):
    output = write_output(
        tmp_path / "out", tmp_path, [[clip_of(100 * s + n, SHORT) for n in range(3)] for s in range(2)]
    )
    compact(output.store)
    dataset = LatentDataset.open(output.uri, receipts=receipts)
    write_output(output.uri, tmp_path, [[clip_of(100 * s + n, SHORT) for n in range(3)] for s in (2, 3)], first=2)
    compact(output.store)
    assert not set(dataset.file_uris()) & set(LatentDataset.open(output.uri).file_uris())
    record_takedown(output.store, "asked", ids=["video00001-0000"])
    dataset.look_for_takedowns()
    rows = dataset.as_map_dataset()
    left = sorted(set(output.clips) - {"video00001-0000"})
    assert sorted(row.id for row in dataset) == sorted(rows[i]["id"] for i in range(len(rows))) == left
    assert [name for _, name in dataset.hidden_rows()] == ["video00001-0000"]


# ---- filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("num_frames = 1", lambda clip: clip.num_frames == 1),
        ("fps >= 8 and width > 24", lambda clip: clip.plan.bucket.width > 24),
        ("metadata.url like '%9'", lambda clip: clip.sample.metadata["url"].endswith("9")),
        ("metadata.nested.score < 0.7 and bucket = 'v9x32x24'", lambda clip: clip.plan.bucket == SHORT),
        ("caption = 'Ein Café, 3' or ID = 'video00105-0000'", lambda clip: clip.sample.index in (3, 105)),
        ("bucket like 'v1x%'", lambda clip: clip.num_frames == 1),
    ],
)
def test_a_filter_keeps_the_rows_for_which_it_is_true(films, where, wanted):
    for output in (films["parquet"], films["tar"]):
        dataset = LatentDataset.open(output.uri, where=where)
        assert {row.id for row in dataset} == {name for name, clip in output.clips.items() if wanted(clip)}
        assert len(dataset) == sum(dataset.buckets.values())
        assert dataset.identity != LatentDataset.open(output.uri).identity


def test_numbers_of_metadata_are_compared_as_numbers(tmp_path):
    metadata = [{"aesthetic": 5}, {"aesthetic": 5.7}, {}, {"aesthetic": None}, {"aesthetic": 6}]
    shards = [[clip_of(100 * n, SHORT, metadata=value)] for n, value in enumerate(metadata)]
    output = write_output(tmp_path / "out", tmp_path, shards)
    found = LatentDataset.open(output.uri, where="fps >= 8 and metadata.aesthetic > 5")
    assert [row.id for row in found] == ["video00100-0000", "video00400-0000"]


def test_a_filter_reads_no_latents(films):
    dataset = LatentDataset.open(films["parquet"].uri)
    largest = dataset.store.stat(dataset.files.value("key", 0)).size
    read = []
    original = type(dataset.store).read_range

    def counted(self, key, start, length, **options):
        read.append((key, length))
        return original(self, key, start, length, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(dataset.store), "read_range", counted)
        LatentDataset.open(films["parquet"].uri, where="num_frames > 1 and caption is not null")
    assert sum(length for _, length in read) < largest + len(dataset.files)  # the footer of one file, for its metadata


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("quality > 3", r"where: no column quality; there are id, caption, .*keys of metadata as metadata.KEY"),
        ("metadata.nothing > 3", r"where: no row has metadata.nothing"),
        ("fps >", r"where: 'fps >' is not an SQL expression: syntax error"),
        ("fps > 'fast'", r"where: \"fps > 'fast'\": Conversion Error"),
        ("random() < 0.5", r"where: random\(\) gives other values at each call"),
        ("fps in (select 1)", r"without subqueries"),
        ("1=1); drop table rows; --", r"where: "),
        ("fps.x > 1", r"where: no column fps.x"),
        ("metadata.nested > 1 and metadata.nested.score > 1", r"Cannot compare values of type STRUCT"),
    ],
)
def test_filters_that_cannot_be_evaluated_are_refused(films, where, message):
    with pytest.raises(ConfigError, match=message):
        LatentDataset.open(films["parquet"].uri, where=where)


def test_metadata_of_several_types_is_refused(tmp_path):
    shards = [[clip_of(100 * n, SHORT, metadata={"score": value})] for n, value in enumerate((1, "high"))]
    output = write_output(tmp_path / "out", tmp_path, shards)
    with pytest.raises(
        ConfigError, match=r"metadata.score has values of several types.*; cast .*metadata->>'\$.score'"
    ):
        LatentDataset.open(output.uri, where="metadata.score > 1")
    found = LatentDataset.open(output.uri, where="metadata->>'$.score' = 'high'")
    assert len(found) == 1


# ---- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_refused(films, tmp_path):
    with pytest.raises(InputError, match=r"has no snapshot 7; there are 1"):
        LatentDataset.open(films["parquet"].uri, snapshot=7)
    with pytest.raises(ConfigError, match="expected latest or a number, once, got 3"):
        LatentDataset.open(f"{films['parquet'].uri}@1", snapshot=3)
    with pytest.raises(OutputError, match="is not a latent set"):
        LatentDataset.open(str(tmp_path))
    with pytest.raises(ConfigError, match="columns: no column quality; there are caption"):
        LatentDataset.open(films["parquet"].uri, columns=("quality",))


def test_several_fingerprints_must_be_told_apart(tmp_path):
    from pipeline.ledger.receipts import Ledger
    from pipeline.operate.publish import PublishOptions, publish
    from tests.pipeline import latent_clips
    from tests.pipeline.latent_clips import write_shard

    output = write_output(tmp_path / "out", tmp_path, mixed_shards(1), publishing=False)
    other = "a" * 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_clips, "FINGERPRINT", other)
        receipt = write_shard(
            output.store, tmp_path, WriteConfig(dtype="float32"), [clip_of(1, SHORT, dtype="float32")]
        )
        Ledger(output.store).commit(replace(receipt, fingerprint_parts={"encoder": {"network": "tiny"}}))
    publish(output.store, PublishOptions(delta=False))
    with pytest.raises(InputError, match="holds the fingerprints aaaaaaaa, f0e1d2c3, a dataset has one"):
        LatentDataset.open(output.uri)
    chosen = LatentDataset.open(output.uri, fingerprint="aaaa")
    assert (len(chosen), chosen.spec.dtype, chosen.spec.fingerprint) == (1, "float32", other)
    with pytest.raises(InputError, match="expected one that begins with 'bbbb'"):
        LatentDataset.open(output.uri, fingerprint="bbbb")


def test_damage_names_the_file_and_the_range(tmp_path):
    output = write_output(tmp_path / "out", tmp_path, mixed_shards(1))
    dataset = LatentDataset.open(output.uri)
    key = dataset.files.value("key", 1)
    index = dataset.indexes.get(1)
    begin, end = index.offset(2), index.offset(2) + index.length(2)
    data = bytearray(output.store.read(key))
    data[begin + 3] ^= 1
    local_store(tmp_path / "out").write(key, bytes(data))
    with pytest.raises(InputError, match=rf"{key} bytes {begin} to {end}: .*is damaged"):
        list(dataset)
    local_store(tmp_path / "out").write(key, bytes(data[: begin + 5]))
    dataset.close()
    with pytest.raises(InputError, match=r"the file ends before the latent of"):
        list(dataset)
