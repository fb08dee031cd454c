"""Builds that cut annotated spans, and builds of a table of inputs: rows, rejects, and that a changed row encodes its shard alone."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import pipeline
from pipeline.corpus import job_annotations
from pipeline.errors import PublishFailed
from pipeline.forecast.survey import forecast_job
from pipeline.ledger.snapshots import Snapshots
from pipeline.nightly.run import nightly
from pipeline.operate.listed_inputs import list_shards
from pipeline.operate.publish import PublishOptions, list_inputs, publish
from pipeline.operate.publish_checks import Limits
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests.tiny_corpus import receipts, rows, tiny_job, video_bytes, write_tar

CLIPS = [{"start": 0, "end": 1, "caption": "first", "score": 1}, ["00:00:01", "00:00:02"], [7, 8]]


pytestmark = pytest.mark.usefixtures("single_thread")


def write_table(path, *table: dict[str, object]):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in table))
    return path


def row_of(key: str, caption: str, start: float = 0.5, folder: object = ".") -> dict[str, object]:
    return {"source": f"{folder}/{key[0]}.tar", "key": key, "start": start, "end": start + 1, "caption": caption}


def seen(output) -> dict[str, list[tuple[str | None, int]]]:
    """Captions and first frames of the rows by key."""
    found: dict[str, list[tuple[str | None, int]]] = {}
    for row in sorted(rows(output).values(), key=lambda row: (row["clip_index"], row["clip_start_frame"])):
        found.setdefault(row["source_key"], []).append((row["caption"], row["clip_start_frame"]))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two tars of videos with 17 frames of 8 per second, clips of 5. `x1` has its spans in JSON, `y1` in the table, `y2` none."""
    folder = tmp_path_factory.mktemp("spans")
    whole = json.dumps({"clips": CLIPS, "lens": 35}).encode()
    write_tar(folder / "x.tar", {"x1": {"mp4": video_bytes(17, seed=1), "txt": b"whole", "json": whole}})
    write_tar(folder / "y.tar", {f"y{n}": {"mp4": video_bytes(17, seed=n), "txt": b"none"} for n in (1, 2)})
    table = write_table(folder / "notes.jsonl", row_of("y1", "b", 0.5), row_of("y1", "a", 0.25), row_of("y9", "gone"))
    tars = [folder / "x.tar", folder / "y.tar"]
    job = tiny_job(tars, folder / "out", **{"clips.select": "spans", "annotations": str(table)})
    return folder, job, pipeline.encode(job), rows(folder / "out")


@pytest.fixture
def again(built, tmp_path):
    """The folder of the tars, the job with a copy of its output, and a table of other spelling that says the same."""
    folder, job, _, _ = built
    shutil.copytree(folder / "out", tmp_path / "out")
    notes = [row_of("y9", "gone", folder=folder), row_of("y1", "a", 0.25, folder), row_of("y1", "b", 0.5, folder)]
    table = write_table(tmp_path / "other.jsonl", *notes, row_of("z1", "of no input", folder=folder))
    return folder, job.model_copy(update={"output": str(tmp_path / "out"), "annotations": str(table)}), table


def test_rows_have_the_captions_and_fields_of_their_spans(built):
    folder, _, report, stored = built
    assert seen(folder / "out") == {"x1": [("first", 0), ("whole", 8)], "y1": [("a", 2), ("b", 4)]}
    metadata = {(row["source_key"], row["clip_index"]): json.loads(row["metadata"]) for row in stored.values()}
    assert metadata["x1", 0] == {"lens": 35, "start": 0, "end": 1, "caption": "first", "score": 1}
    assert metadata["x1", 1] == {"lens": 35, "start": "00:00:01", "end": "00:00:02"}
    assert report.rejects == {"span_outside": 1, "no_spans": 1, "unmatched_row": 1}
    assert (report.counts.samples, report.counts.encoded, report.counts.damaged) == (4, 2, 1)
    assert verify_output(open_store(str(folder / "out"), built[1].storage)).ok


def test_a_plan_says_the_same_as_the_build(built):
    plan = forecast_job(built[1])
    assert (plan.clips, {reason: found.count for reason, found in plan.dropped.items()}) == (4, built[2].rejects)


def test_a_changed_row_encodes_its_shard_alone(again):
    folder, job, table = again
    before = rows(job.output)
    assert pipeline.encode(job).shards_done == 0, "order, spelling and rows about other sources change nothing"
    write_table(
        table, row_of("y1", "a", 0.25, folder), row_of("y9", "gone", 0.5, folder), row_of("y1", "new", 0.5, folder)
    )
    report = pipeline.encode(job)
    assert (report.shards_done, report.counts.samples) == (1, 3)
    added = [row for name, row in rows(job.output).items() if name not in before]
    assert sorted(row["caption"] for row in added) == ["a", "new"]
    assert {len(receipt.shard.objects[0].annotations) for receipt in receipts(job.output)} == {0, 32}


def test_a_listing_without_the_annotations_says_what_is_not_encoded(again):
    _, job, _ = again
    store = open_store(job.output, job.storage)
    options = PublishOptions(delta=False, limits=Limits(reject_budget=1.0))
    bare = job.model_copy(update={"annotations": None})
    with pytest.raises(PublishFailed, match=r"1 .*not (done|encoded)"):
        publish(store, options, listing=list_inputs(bare, store))
    snapshot = publish(store, options, listing=list_inputs(job, store)).snapshot
    assert (snapshot.counts["rows"], snapshot.num_open) == (4, 0)
    assert snapshot.rejects == {"span_outside": 1, "no_spans": 1, "unmatched_row": 1}


def test_a_night_encodes_and_publishes_what_changed_in_the_table(again):
    folder, job, table = again
    settings = job.nightly.model_copy(update={"canary": 0, "delta": False})
    job = job.model_copy(update={"nightly": settings, "reject_budget": 1.0})
    first = nightly(job)
    assert (first.outcome, first.shards_done) == ("done", 0)
    write_table(table, row_of("y1", "only", 0.25, folder))
    night = nightly(job)
    assert (night.outcome, night.shards_done) == ("done", 1)
    newest = Snapshots(open_store(job.output, job.storage)).latest()
    assert newest is not None
    assert newest.counts["rows"] == 3
    assert newest.changes["inputs_replaced"] == 1


def test_a_changed_span_beside_a_plain_video_makes_another_version_of_that_video_alone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"video")
        (tmp_path / f"{name}.json").write_text('{"clips": [[0, 1]], "note": 1}')

    def versions(select: str = "spans") -> list[str]:
        job = tiny_job(tmp_path / "*.mp4", tmp_path / "out", **{"clips.select": select})
        with job_annotations(job) as annotations:
            return [source.version for shard in list_shards(job, annotations) for source in shard.objects]

    before = versions()
    (tmp_path / "a.json").write_text('{"note": 2, "clips": [[0, 1.0]]}')
    assert [first == second for first, second in zip(before, versions(), strict=True)] == [False, True]
    (tmp_path / "a.json").write_text('{"note": 3, "clips": [[0, 1]]}')
    assert versions() == before
    assert all("+" not in version for version in versions("tile"))


@pytest.fixture
def listed(tmp_path):
    """A table of plain videos, one of which is not there."""
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(video_bytes(5, seed=ord(name)))
    (tmp_path / "videos" / "a.txt").write_text("beside")
    table = tmp_path / "videos.csv"
    table.write_text("path,caption,score\nvideos/a.mp4,of the table,0.5\nvideos/b.mp4,,\nvideos/c.mp4,c,\n")
    return table, tiny_job(table, tmp_path / "out", reject_budget=1.0)


def test_a_table_of_inputs_is_encoded_once_and_again_only_where_it_changed(listed, tmp_path):
    table, job = listed
    report = pipeline.encode(job)
    assert (report.counts.encoded, report.rejects) == (2, {"missing_file": 1})
    assert seen(tmp_path / "out") == {"a": [("of the table", 0)], "b": [(None, 0)]}
    assert [json.loads(row["metadata"]) for row in rows(tmp_path / "out").values() if row["source_key"] == "a"] == [
        {"caption": "of the table", "score": "0.5"}
    ]
    assert pipeline.encode(job).shards_done == 0

    (tmp_path / "videos" / "c.mp4").write_bytes(video_bytes(5, seed=3))
    assert pipeline.encode(job).counts.samples == 1
    table.write_text(table.read_text().replace("videos/b.mp4,,", "videos/b.mp4,new,"))
    assert pipeline.encode(job).counts.samples == 1
    assert sorted(seen(tmp_path / "out")["b"], key=str) == [("new", 0), (None, 0)]
    os.utime(tmp_path / "videos" / "a.mp4", (1, 1))
    assert pipeline.encode(job).counts.samples == 0  # the same bytes and the same row
