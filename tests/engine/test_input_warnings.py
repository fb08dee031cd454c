"""Warnings about encoded inputs are counted in receipts and shown by encode, plan and status, each sample once."""

import io
import json
import pickle
import tarfile

import duckdb
import pyarrow.json
import pytest

import pipeline
from pipeline.cli.wording import build_lines, plan_lines, status_lines, warning_lines
from pipeline.config import StorageConfig
from pipeline.errors import ConfigError
from pipeline.forecast.survey import forecast_job
from pipeline.ledger.totals import tally
from pipeline.operate.status import status
from pipeline.reader import read_samples
from pipeline.records import Receipt, Sample
from pipeline.storage import open_store
from tests.pipeline.test_reader import LIMIT, shard_of
from tests.tiny_corpus import receipts, rows, tiny_job, video_bytes, write_tar

VIDEO, SHORT = video_bytes(9), video_bytes(3)
DEEP = b'{"a":' * 500 + b"1" + b"}" * 500
MEMBERS = [
    ("Track 2.0 (A).mp4", VIDEO), ("Track 2.0 (A).txt", b"caption A"),
    ("Track 2.0 (B).mp4", VIDEO), ("Track 2.0 (B).txt", b"caption B"),
    ("k.mp4", VIDEO), ("k.txt", b"first"), ("k.mp4", VIDEO), ("k.txt", b"second"),
    ("latin.mp4", VIDEO), ("latin.txt", "ein größerer Hund".encode("cp1252")),
    ("bad.mp4", VIDEO), ("bad.txt", b"\xff\xfea"),
    ("deep.mp4", VIDEO), ("deep.json", DEEP),
    ("nan.mp4", VIDEO), ("nan.json", b'{"caption": "n", "x": NaN, "big": 100000000000000000000}'),
    ("two.mp4", VIDEO), ("two.webm", b"not read"), ("two.txt", b"two"), ("two.wav", b"sound"),
    ("UP.MP4", VIDEO), ("UP.TXT", b"up"),
    ("short.mp4", SHORT), ("short.txt", b"\xff\xfea"),
]  # fmt: skip
WARNINGS = {
    "caption_encoding": 1,
    "deep_metadata": 1,
    "duplicate_fields": 1,
    "huge_integers": 1,
    "ignored_fields": 1,
    "no_caption": 2,
    "nonfinite_metadata": 1,
    "undecodable_caption": 1,
    "untagged_color": 9,
}
REJECTS = {"duplicate_key": 1, "extra_video": 1, "too_short": 1}


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warnings")
    path = write_members(folder / "a.tar", MEMBERS)
    job = tiny_job(path, folder / "out", **{"clips.select": "head", "reject_budget": 1})
    return path, job, pipeline.encode(job)


def test_every_video_of_a_tar_is_a_row_or_a_reject(build):
    _, job, report = build
    assert (report.counts.samples, report.counts.encoded, report.counts.rejected) == (12, 9, 3)
    assert report.rejects == REJECTS
    found = {row["file_name"]: row for row in rows(job.output).values()}
    assert {name: (row["source_key"], row["caption"]) for name, row in found.items()} == {
        "Track 2.0 (A).mp4": ("Track 2.0 (A)", "caption A"),
        "Track 2.0 (B).mp4": ("Track 2.0 (B)", "caption B"),
        "k.mp4": ("k", "first"),
        "latin.mp4": ("latin", "ein größerer Hund"),
        "bad.mp4": ("bad", None),
        "deep.mp4": ("deep", None),
        "nan.mp4": ("nan", "n"),
        "two.mp4": ("two", "two"),
        "UP.MP4": ("UP", "up"),
    }
    assert "caption_encoding:cp1252" in found["latin.mp4"]["warnings"]
    assert json.loads(found["nan.mp4"]["metadata"]) == {"caption": "n", "x": None, "big": "100000000000000000000"}
    assert found["deep.mp4"]["metadata"] == "{}"
    assert len({row["sample_index"] for row in found.values()}) == len(found)
    for row in found.values():
        assert duckdb.connect().execute("select json_valid(?)", [row["metadata"]]).fetchall() == [(True,)]
        pyarrow.json.read_json(io.BytesIO(row["metadata"].encode() + b"\n"))


def test_every_video_that_opened_is_counted_by_length_and_size(build):
    (receipt,) = receipts(build[1].output)
    assert receipt.videos == ({"px0": 9, "s1": 9, "ms": 9 * 1125},)
    known = {reject.reason: (reject.video, reject.buckets) for reject in receipt.rejects}
    nothing = ({}, {})
    short = ({"px0": 1, "s0": 1, "ms": 375}, {"v5x32x32": 1})
    assert known == {"duplicate_key": nothing, "extra_video": nothing, "too_short": short}


def test_plan_encode_and_status_count_the_same_warnings(build):
    _, job, report = build
    (receipt,) = receipts(job.output)
    assert report.warnings == receipt.warnings == WARNINGS
    state = status(open_store(str(job.output), StorageConfig()))
    assert state["warnings"] == WARNINGS
    plan = forecast_job(job)
    assert plan.warnings == WARNINGS
    assert {reason: item.count for reason, item in plan.dropped.items()} == REJECTS
    line = (
        "  warnings  untagged_color 9, no_caption 2, caption_encoding 1, deep_metadata 1, duplicate_fields 1, "
        "huge_integers 1, ignored_fields 1, nonfinite_metadata 1, undecodable_caption 1"
    )
    for lines in (build_lines(report), status_lines(state), plan_lines(plan.to_dict())):
        assert line in lines
    assert json.loads(json.dumps(report.to_dict()))["warnings"] == WARNINGS


def test_harmless_warnings_are_listed_last():
    warnings = {"skipped_directory": 9, "no_caption": 1, "reopened_keys": 2}
    assert warning_lines(warnings) == ["  warnings  no_caption 1, skipped_directory 9, reopened_keys 2"]
    assert warning_lines({}) == []


def test_samples_with_any_json_can_be_pickled(build):
    path, _, _ = build
    for item in read_samples(shard_of(path), StorageConfig(), max_video_bytes=LIMIT):
        assert pickle.loads(pickle.dumps(item)) == item  # noqa: S301


def test_later_runs_count_no_warning_twice(build):
    _, job, _ = build
    resumed = pipeline.encode(job)
    assert (resumed.shards_done, resumed.warnings) == (0, {})
    store = open_store(str(job.output), StorageConfig())
    assert status(store)["warnings"] == WARNINGS
    for reason in ("extra_video", "duplicate_key"):  # the same bytes give them again
        with pytest.raises(ConfigError, match=rf"{reason} follow from the bytes of the tar alone"):
            pipeline.encode(job.model_copy(update={"retry_rejects": ("too_short", reason)}))
    again = pipeline.encode(job.model_copy(update={"retry_rejects": ("too_short",)}))
    assert (again.shards_done, again.warnings) == (1, {})
    assert status(store)["warnings"] == WARNINGS
    assert status(store)["rejects"] == REJECTS
    assert (status(store)["samples"], status(store)["encoded"]) == (12, 9)


def test_a_file_in_two_receipts_counts_its_warnings_once(tmp_path):
    """Two runs with other listings that started together: the later receipt is partly hidden, and its warnings are left out."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(video_bytes(9, seed=ord(name)))
    jobs = [tiny_job([tmp_path / f"{n}.mp4" for n in names], tmp_path / f"out{names}") for names in ("a", "ab")]
    reports = [pipeline.encode(job) for job in jobs]
    assert [report.warnings["no_caption"] for report in reports] == [1, 2]
    for source in (tmp_path / "outab").rglob("*"):
        target = tmp_path / "outa" / source.relative_to(tmp_path / "outab")
        if source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (found,) = tally(open_store(str(tmp_path / "outa"), StorageConfig())).values()
    assert (found.counts.samples, found.warnings["no_caption"]) == (2, 1)


def test_a_receipt_of_an_earlier_version_has_no_warnings_and_no_videos(build):
    _, job, _ = build
    raw = json.loads(receipts(job.output)[0].to_json())
    del raw["warnings"], raw["videos"]
    assert all("video" not in reject for reject in raw["rejects"] if reject["reason"] != "too_short")
    found = Receipt.from_json(json.dumps(raw).encode())
    assert (found.warnings, found.videos) == ({}, None)


def test_a_plain_file_keeps_its_name(tmp_path):
    (tmp_path / "v").mkdir()
    for name in ("UP.MP4", "clip.v2.mp4"):
        (tmp_path / "v" / name).write_bytes(VIDEO)
    (tmp_path / "v" / "UP.TXT").write_bytes(b"up")
    pipeline.encode(tiny_job(tmp_path / "v", tmp_path / "out", **{"clips.select": "head"}))
    found = {row["file_name"]: (row["source_key"], row["caption"]) for row in rows(tmp_path / "out").values()}
    assert found == {"UP.MP4": ("UP", "up"), "clip.v2.mp4": ("clip.v2", None)}


def test_ids_of_ordinary_keys_are_unchanged(tmp_path):
    """Ids are functions of uri, etag, key, clip and fingerprint: the same whether the second video of the key is there or not."""
    from pipeline.engine.worker.clip_id import clip_id
    from pipeline.records import Bucket, ClipPlan

    plan = ClipPlan(0, 0, Bucket(5, 32, 32), 8.0, 0.0, 32, 32, 0, 0)
    fields = {"mp4": b"1", "txt": b"t", "json": b"{}"}
    path = write_tar(tmp_path / "x.tar", {"a": fields, "b": {"orig.mp4": b"2", "txt": b"u"}})
    found = list(read_samples(shard_of(path), StorageConfig(), max_video_bytes=LIMIT))
    ids = [clip_id(item, "etag", plan, "f") for item in found if isinstance(item, Sample)]
    expected = [clip_id(Sample(key, 0, str(path), b"", "mp4"), "etag", plan, "f") for key in ("a", "b")]
    assert ids == expected
