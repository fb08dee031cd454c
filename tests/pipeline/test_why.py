"""`lathe why`: one input's history by URI, key or row id, from few reads; similar names for unknown ones; inputs without a receipt."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.why_wording import why_lines
from pipeline.config import StorageConfig, WriteConfig
from pipeline.engine.worker.clip_id import clip_id
from pipeline.errors import InputError, OutputError
from pipeline.format.layout import CURRENT, retired_key
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns, record_takedown
from pipeline.operate.compact import compact
from pipeline.operate.why import why
from pipeline.records import LatentClip, Receipt, Reject, Shard, SourceObject
from pipeline.storage import Store
from pipeline.storage.local import LocalStore
from tests.pipeline.latent_clips import FINGERPRINT, latent_clip, local_store, write_shard
from tests.pipeline.published import publish_all

CONFIG = StorageConfig()
SHARDS = 12


def uri_of(shard: int) -> str:
    return f"s3://corpus/shard-{shard:03d}.tar"


def clip_of(seed: int, key: str, uri: str, clip: int = 0) -> LatentClip:
    """A clip with the id that a build would give it."""
    made = latent_clip(seed, clip=clip, key=key, uri=uri)
    return replace(made, id=clip_id(made.sample, "e", made.plan, FINGERPRINT))


def commit(store: Store, folder: Path, shard: int, first: str | None = None) -> Receipt:
    """A shard of two samples with two clips each, and a third sample that was too short. `first`: key of the first sample."""
    keys = [first or f"{shard:03d}/0", f"{shard:03d}/1"]
    clips = [clip_of(10 * shard + n, key, uri_of(shard), clip) for n, key in enumerate(keys) for clip in range(2)]
    reject = Reject(f"{shard:03d}/2", "clips", "too_short", "3 frames, the shortest clip needs 17", True, uri_of(shard))
    written = write_shard(store, folder / "spool", WriteConfig(), clips, shard=shard, rejects=(reject,))
    counts = replace(written.counts, samples=3, encoded=2, rejected=1)
    return Ledger(store).commit(replace(written, counts=counts))


class CountingStore(LocalStore):
    """Keeps the keys that were read."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.read_keys: list[str] = []

    def read(self, key: str) -> bytes:
        self.read_keys.append(key)
        return super().read(key)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards 0 to 10 are in snapshot 1, all in snapshot 2, with a cache of summaries. Nothing may be added."""
    folder = tmp_path_factory.mktemp("why")
    store = local_store(folder / "out")
    Ledger(store).prepare("films")
    for shard in range(SHARDS - 1):
        commit(store, folder, shard)
    publish_all(store)
    commit(store, folder, SHARDS - 1)
    publish_all(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.ledger.summaries.MIN_UNCACHED_RECEIPTS", 1)
        summaries = Summaries(store)
        summaries.all()
        summaries.save()
    return store.root


def history_of(store: Store, name: str) -> dict[str, Any]:
    history = why(store, name, CONFIG)
    json.dumps(history)
    assert why_lines(history)
    return history


def test_a_sample_by_its_key_reads_its_own_index_and_receipt_only(output: str) -> None:
    store = CountingStore(output)
    history = history_of(store, "003/1")
    assert (history["state"], history["key"], history["where"]["uri"]) == ("encoded", "003/1", uri_of(3))
    (version,) = history["versions"]
    assert [row["source_key"] for row in version["rows"]] == ["003/1"] * 2
    assert version["rows"][0]["fps"] == 8.0
    assert version["rows"][0]["bucket"] == "v17x64x48"
    assert (version["num_rejects"], version["counts"]) == (0, True)
    assert history["snapshots"] == [
        {"number": 1, "rows": 2, "taken_down": 0},
        {"number": 2, "rows": 2, "taken_down": 0},
    ]
    indexes = [key for key in store.read_keys if key.startswith("_index/")]
    receipts = [key for key in store.read_keys if key.startswith("_receipts/")]
    assert len(set(indexes)) == 1
    assert set(receipts) == {version["receipt"]}


def test_a_row_by_its_id_and_an_input_by_its_uri(output: str) -> None:
    store = local_store(Path(output))
    by_uri = history_of(store, uri_of(SHARDS - 1))
    (version,) = by_uri["versions"]
    assert (version["num_rows"], version["num_rejects"]) == (4, 1)
    assert by_uri["snapshots"] == [{"number": 2, "rows": 4, "taken_down": 0}]  # it came after the first
    row = version["rows"][2]
    history = history_of(store, row["id"])
    assert [item["id"] for item in history["versions"][0]["rows"]] == [row["id"]]
    assert (history["versions"][0]["num_rejects"], history["snapshots"]) == (
        0,
        [{"number": 2, "rows": 1, "taken_down": 0}],
    )


def test_a_rejected_sample_tells_its_reason(output: str) -> None:
    history = history_of(local_store(Path(output)), "004/2")
    assert (history["state"], history["where"]["uri"]) == ("rejected", uri_of(4))
    (reject,) = history["versions"][0]["rejects"]
    assert (reject["reason"], reject["key"]) == ("too_short", "004/2")
    assert "too_short (by the job's rules): 3 frames" in "\n".join(why_lines(history))


def test_a_name_that_is_not_valid_unicode_is_a_name(output: str) -> None:
    with pytest.raises(InputError, match="not known"):
        why(local_store(Path(output)), "\udcff", CONFIG)


@pytest.mark.parametrize("name", ["003/7", "s3://corpus/shard-03.tar", "003_1-0000-0123456789abcdef"])
def test_unknown_names_give_similar_ones(output: str, name: str) -> None:
    with pytest.raises(InputError, match=r"not known.*similar names: .*3"):
        why(local_store(Path(output)), name, CONFIG)


def test_a_key_of_several_inputs_needs_the_input(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    for shard in range(2):
        commit(store, tmp_path, shard, "same")
    with pytest.raises(InputError, match=rf"2 inputs have.*{uri_of(0)}#same, {uri_of(1)}#same"):
        why(store, "same", CONFIG)
    history = history_of(store, f"{uri_of(1)}#same")
    assert history["where"]["uri"] == uri_of(1)
    assert history["versions"][0]["num_rows"] == 2
    assert history_of(store, f"{uri_of(1)}#001/2")["state"] == "rejected"
    for unknown in (f"{uri_of(1)}#other", "s3://corpus/shard-01.tar#same"):
        with pytest.raises(InputError, match="not known"):
            why(store, unknown, CONFIG)


def test_a_takedown_is_named_and_rows_stay_in_the_count_of_those_hidden(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    receipt = commit(store, tmp_path, 0)
    publish_all(store)
    record_takedown(store, "asked by the author", samples=[(uri_of(0), "000/0")])
    taken, other = history_of(store, "000/0"), history_of(store, "000/1")
    assert taken["state"] == "taken_down"
    assert [item["reason"] for item in taken["takedowns"]] == ["asked by the author"]
    assert (other["state"], other["takedowns"]) == ("encoded", [])
    assert taken["snapshots"] == [{"number": 1, "rows": 0, "taken_down": 2}]
    assert "1 does not show it; hidden by takedowns in 1 (2 rows)" in "\n".join(why_lines(taken))
    assert "shown by 1 (2 rows)" in "\n".join(why_lines(other))
    whole = history_of(store, uri_of(0))
    assert (whole["state"], whole["versions"][0]["num_taken_down"]) == ("encoded", 2)
    assert whole["snapshots"] == [{"number": 1, "rows": 2, "taken_down": 2}]
    assert [item["reason"] for item in whole["takedowns"]] == ["asked by the author"]
    for item in receipt.files:  # after compaction and gc
        store.delete(item.index_key)
    assert history_of(store, uri_of(0))["versions"][0]["num_rows"] == 0


def test_names_that_gc_replaced_by_hashes_are_known_as_taken_down(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    receipts = [commit(store, tmp_path, shard) for shard in range(2)]
    publish_all(store)
    row = history_of(store, "001/1")["versions"][0]["rows"][0]["id"]
    names = (uri_of(2), "000/0", f"{uri_of(0)}#000/0", row)
    record_takedown(store, "asked", sources=[uri_of(2)], samples=[(uri_of(0), "000/0")], ids=[row])
    (record,) = read_takedowns(store).records
    for item in (item for receipt in receipts for item in receipt.files):  # after compaction and gc
        store.delete(item.index_key)
    store.write(record.key, record.without_names("2026-11-29T00:00:00+00:00").to_json())
    for name in names:
        found = history_of(store, name)
        assert (found["state"], [item["key"] for item in found["takedowns"]]) == ("taken_down", [record.key]), name
    for unknown in ("000/9", f"{uri_of(1)}#000/0", f"{row[:-1]}x", "\udcff"):
        with pytest.raises(InputError, match="not known"):
            why(store, unknown, CONFIG)
    assert store.read(record.key).count(b"000/0") == 0


def test_of_two_receipts_of_one_input_the_first_counts(tmp_path: Path) -> None:
    """Two runs may group plain files differently."""
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    source = SourceObject("/videos/a.mp4", 10, "e")
    for number, objects in enumerate([(source,), (source, SourceObject("/videos/b.mp4", 10, "e"))]):
        shard = Shard("files", f"videos-{number}", objects)
        clips = [clip_of(n, Path(item.uri).stem, item.uri) for n, item in enumerate(objects)]
        written = write_shard(store, tmp_path / "s", WriteConfig(), clips, shard=number, attempt=f"a{number}")
        Ledger(store).commit(
            replace(written, shard=shard, shard_id=shard.id(FINGERPRINT), created=f"2026-01-0{number + 1}T00:00:00")
        )
    history = history_of(store, "/videos/a.mp4")
    assert [version["counts"] for version in history["versions"]] == [True, False]
    assert history["where"]["there"] is False
    assert [version["counts"] for version in history_of(store, "b")["versions"]] == [True]


def write_log(store: Store, build: str, events: list[dict[str, Any]], *, live: bool) -> None:
    lines = [json.dumps({"ts": f"t{n}", **event}) for n, event in enumerate(events)]
    store.write(CURRENT.run_log_key(build, 1), "\n".join(lines).encode())
    if live:
        beat = {"build": build, "started": time.time(), "updated": time.time(), "every_s": 30.0, "running": True}
        store.write(CURRENT.progress_key(build), json.dumps(beat).encode())


def assigned(shard: str, uri: str, last_uri: str | None = None) -> dict[str, Any]:
    where = {"uri": uri, "last_uri": last_uri or uri, "objects": 1 if last_uri is None else 9}
    return {"event": "assigned", "shard": shard, "shard_id": shard, "worker": "encoder-1", "reason": "next", **where}


def test_inputs_without_a_receipt_are_running_waiting_given_up_pending_or_open(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    commit(store, tmp_path, 0)
    open_source = SourceObject("/videos/open.mp4", 1, "e")
    publish_all(store, listing=lambda: [SourceObject(uri_of(0), 1000, "e0"), open_source], partial=True)
    failed = {"event": "given_up", "shard_id": "tar", "reason": "failed 3 times"}
    ended = [{"event": "started", "inputs": ["/old"]}, assigned("tar", "/old/a.tar"), failed]
    write_log(store, "20260101T000000Z-00000000", ended, live=False)
    events = [
        {"event": "started", "inputs": ["/videos", "s3://corpus/x"]},
        assigned("group", "/videos/b.mp4", "/videos/d.mp4"),
        assigned("tar", "s3://corpus/x/9.tar"),
        {"event": "retried", "shard_id": "tar", "reason": "attempt 1 of 3 failed"},
    ]
    write_log(store, "20260201T000000Z-11111111", events, live=True)
    states = {name: history_of(store, name)["state"] for name in ("/videos/c.mp4", "/videos/open.mp4", "/old/a.tar")}
    assert states == {"/videos/c.mp4": "running", "/videos/open.mp4": "pending", "/old/a.tar": "given_up"}
    waiting = history_of(store, "s3://corpus/x/9.tar")
    assert (waiting["state"], waiting["builds"][0]["reason"]) == ("waiting", "attempt 1 of 3 failed")
    store.delete(CURRENT.progress_key("20260201T000000Z-11111111"))
    assert history_of(store, "/videos/open.mp4")["open_in"] == 1
    assert history_of(store, "/videos/open.mp4")["state"] == history_of(store, "/videos/c.mp4")["state"] == "open"
    with pytest.raises(InputError, match="not known"):
        why(store, "/elsewhere/c.mp4", CONFIG)


def test_a_file_that_a_build_passes_over_and_one_that_is_not_there_are_not_called_open(tmp_path: Path) -> None:
    """The build's log names only the folder that was encoded."""
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    for name in ("a.mp4", "a.txt", "b.jpg", ".c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    started = {
        "event": "started",
        "folder": str(tmp_path.parent),
        "inputs": [tmp_path.name],
    }  # run there as `encode {name}`
    group = assigned("group", str(tmp_path / "a.aac"), str(tmp_path / "z.mp4"))
    done = {"event": "done", "shard_id": "group"}  # its receipt names none of them
    write_log(store, "20260101T000000Z-00000000", [started, group, done], live=True)
    histories = {name: history_of(store, str(tmp_path / name)) for name in ("a.mp4", "a.txt", "b.jpg", ".c.mp4")}
    assert {name: history["state"] for name, history in histories.items()} == {
        "a.mp4": "pending",
        "a.txt": "passed_over",
        "b.jpg": "passed_over",
        ".c.mp4": "passed_over",
    }
    assert "images are encoded with --images keep" in "\n".join(why_lines(histories["b.jpg"]))
    with pytest.raises(InputError, match="not known"):
        why(store, str(tmp_path / "b.mp4"), CONFIG)
    record_takedown(store, "asked", sources=[str(tmp_path / "a.mp4")])
    history = history_of(store, str(tmp_path / "a.mp4"))
    assert (history["state"], [item["reason"] for item in history["takedowns"]]) == ("taken_down", ["asked"])


def test_an_input_whose_receipt_was_retired_is_still_known(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    receipt, other = (commit(store, tmp_path, shard) for shard in range(2))
    publish_all(store)
    row = history_of(store, "000/1")["versions"][0]["rows"][0]["id"]
    publish_all(store, listing=list(other.shard.objects), removed="drop")
    assert "shown by 1 (4 rows); the newest, 2, does not show it" in "\n".join(why_lines(history_of(store, uri_of(0))))
    moved = retired_key(receipt.shard_id, receipt.attempt)
    store.write(moved, store.read(CURRENT.receipt_key(receipt.shard_id)))  # as gc does
    store.delete(CURRENT.receipt_key(receipt.shard_id))
    done = {"event": "done", "shard_id": receipt.shard_id}
    write_log(store, "20260101T000000Z-00000000", [assigned(receipt.shard_id, uri_of(0)), done], live=False)
    for name in (uri_of(0), "000/1", row):
        history = history_of(store, name)
        assert (history["state"], history["retired"]) == ("retired", [moved])
        assert moved in "\n".join(why_lines(history))


def test_an_output_without_receipts_and_another_folder_are_refused(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    with pytest.raises(InputError, match="no name is similar"):
        why(store, "a", CONFIG)
    with pytest.raises(OutputError, match="not a latent set"):
        why(local_store(tmp_path), "a", CONFIG)


def test_rows_that_a_compaction_moved_are_told_where_they_are_now(tmp_path: Path) -> None:
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    receipts = [commit(store, tmp_path, shard) for shard in range(3)]
    publish_all(store)
    record_takedown(store, "asked", samples=[(uri_of(1), "001/0")])
    compact(store)
    history = history_of(store, "002/1")
    files = {row["file"] for row in history["versions"][0]["rows"]}
    assert len(files) == 1
    assert not files & {item.key for receipt in receipts for item in receipt.files}
    assert history["snapshots"] == [
        {"number": 1, "rows": 2, "taken_down": 0},
        {"number": 2, "rows": 2, "taken_down": 0},
    ]
    for item in (file for receipt in receipts for file in receipt.files):  # as gc does, once snapshot 1 is not kept
        store.delete(item.index_key)
    moved, dropped = history_of(store, "002/1"), history_of(store, uri_of(1))
    assert moved["snapshots"] == [{"number": 2, "rows": 2, "taken_down": 0}]
    assert [row["file"] for row in moved["versions"][0]["rows"]] == [*files] * 2
    assert [row["source_key"] for row in dropped["versions"][0]["rows"]] == ["001/1"] * 2
    assert [item["reason"] for item in dropped["takedowns"]] == ["asked"]
    gone = history_of(store, "001/0")
    assert (gone["state"], gone["versions"][0]["num_rows"], len(gone["takedowns"])) == ("taken_down", 0, 1)
