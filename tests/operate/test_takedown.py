"""`lathe takedown`: what names stand for, what is hidden and where, undo, records."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import WriteConfig
from pipeline.errors import InputError, OutputError
from pipeline.format.columns import readable_key
from pipeline.format.layout import snapshot_key
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.row_search import IndexedFile
from pipeline.ledger.snapshots import Snapshot, Snapshots
from pipeline.ledger.summary import uri_id
from pipeline.ledger.takedown_record import Takedown, TakenRow
from pipeline.ledger.takedowns import Takedowns, read_record, read_takedowns, record_takedown
from pipeline.loader import LatentDataset
from pipeline.operate.gc import collect
from pipeline.operate.takedown import history, take_down, undo
from pipeline.operate.verify import verify_output
from pipeline.records import Bucket, MemberObject, MemberRule, Reject, Shard, SourceObject
from pipeline.storage import Store
from tests.operate.outputs import NEWEST, aged
from tests.pipeline.latent_clips import FINGERPRINT, PARTS, latent_clip, local_store, receipt_of, write_shard
from tests.pipeline.published import publish_all, shown_ids
from tests.pipeline.test_publish_takedowns import shown_by_view

ASKED = {"reason": "asked", "by": "ann"}


def uri_of(shard: int) -> str:
    return f"s3://corpus/shard-{shard:03d}.tar"


def clips_of(shard: int, keys: list[str]) -> list:
    """One clip a key, with ids as builds make them."""
    found = []
    for n, key in enumerate(keys):
        clip = latent_clip(100 * shard + n, uri=uri_of(shard), key=key)
        found.append(replace(clip, id=f"{readable_key(key)}-0000-{shard:04x}{n:012x}"))
    return found


def commit(store: Store, spool: Path, shard: int, keys: list[str]) -> None:
    Ledger(store).commit(write_shard(store, spool, WriteConfig(), clips_of(shard, keys), shard=shard))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of two samples, two in snapshot 1 and all in snapshot 2, with a Delta log. Shards 1 and 2 have a sample `both`."""
    folder = tmp_path_factory.mktemp("takedown")
    store = local_store(folder / "out")
    Ledger(store).prepare("films")
    commit(store, folder, 0, ["a/cat", "a/dog"])
    commit(store, folder, 1, ["b/dog", "both"])
    publish_all(store)
    commit(store, folder, 2, ["c/cow", "both"])
    publish_all(store)
    return folder / "out"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made, tmp_path / "out")
    return local_store(tmp_path / "out")


def loaded(store: Store, number: int | str = "latest") -> set[str]:
    """Sample keys that a loader shows."""
    return {str(row.id).rsplit("-", 2)[0] for row in LatentDataset.open(store.root, number).rows()}


def recorded(store: Store) -> list[str]:
    return [info.key for info in store.list("_takedowns/")]


def test_a_source_is_hidden_at_once_in_every_snapshot_and_in_the_delta_view(store: Store) -> None:
    found = take_down(store, [uri_of(1)], **ASKED)
    assert found["snapshots"] == {1: 2, 2: 2}
    assert found["stored"] == {"rows": 2, "files": 1}
    assert loaded(store, 1) == {"a_cat", "a_dog"}
    assert loaded(store) == {"a_cat", "a_dog", "c_cow", "both"}
    (receipt,) = [item for item in Ledger(store).all() if item.shard.objects[0].uri == uri_of(1)]
    log = b"".join(store.read(info.key) for info in store.list("data/_delta_log/"))
    assert receipt.files[0].key.removeprefix("data/").encode() not in log
    assert len(shown_by_view(store)) == 2
    (record,) = read_takedowns(store).records
    assert (record.sources, record.reason, record.by) == ((uri_of(1),), "asked", "ann")
    assert record.key == found["record"]


def test_a_key_names_the_sample_and_an_id_the_row(store: Store) -> None:
    (cow,) = [name for name in shown_ids(store, publish_all(store)) if name.startswith("c_cow")]
    found = take_down(store, ["a/cat", f"{uri_of(1)}#both", cow], **ASKED)
    assert found["samples"] == [[uri_of(1), "both"], [uri_of(0), "a/cat"]]
    assert found["rows"] == [cow]
    assert found["snapshots"] == {1: 2, 2: 3}
    assert loaded(store, 2) == {"a_dog", "b_dog", "both"}
    (taken,) = [row for row in read_takedowns(store).records[0].rows]
    assert taken.source_uri == uri_of(2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "both",
            rf"2 sources of .* have a sample 'both': {uri_of(1)}, {uri_of(2)}; nothing was recorded. Name one as {uri_of(1)}#both",
        ),
        ("a/cta", r"no source, sample or row 'a/cta' \(there is a/cat"),
        ("s3://corpus/shard-007.tar", r"\(there is s3://corpus/shard-00\d.tar"),
        (f"{uri_of(0)}#b/dog", r"no source, sample or row 's3://corpus/shard-000.tar#b/dog'"),
    ],
)
def test_ambiguous_and_unknown_names_record_nothing(store: Store, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        take_down(store, ["a/dog", name], **ASKED)
    assert recorded(store) == []


def test_an_unknown_source_may_be_taken_down_before_it_is_encoded(store: Store, tmp_path: Path) -> None:
    found = take_down(store, ["s3://corpus/later.tar"], **ASKED, allow_unknown=True)
    assert (found["unknown"], found["snapshots"]) == (["s3://corpus/later.tar"], {1: 0, 2: 0})
    assert read_takedowns(store).takes("s3://corpus/later.tar")


def test_names_that_are_not_utf_8_are_found_as_rows_spell_them(store: Store, tmp_path: Path) -> None:
    odd = "d/\udcff"
    commit(store, tmp_path, 3, [odd, "d/plain"])
    publish_all(store)
    for name in (odd, f"{uri_of(3)}#{odd}"):
        assert take_down(store, [name], **ASKED, dry_run=True)["samples"] == [[uri_of(3), "d/\\udcff"]]
    assert take_down(store, ["/films/\udcff.mp4"], **ASKED, allow_unknown=True)["unknown"] == ["/films/\udcff.mp4"]
    assert take_down(store, [odd], **ASKED)["snapshots"][3] == 1
    assert loaded(store) == {"a_cat", "a_dog", "b_dog", "both", "c_cow", "d_plain"}


def test_an_index_is_read_if_one_of_many_names_can_lie_in_it() -> None:
    words = ["".join(word) for length in (1, 2, 3) for word in itertools.product("a-z", repeat=length)]
    for low, high in itertools.combinations(sorted(words), 2):
        holding = {word for word in words if low[: len(word)] <= word <= high}
        file = IndexedFile("i", "s", low, high)
        assert {word for word in words if file.may_hold([word])} == holding
        others = sorted(set(words) - holding)
        assert not file.may_hold(others)
        assert all(file.may_hold(sorted([*others, word])) for word in holding)


def test_a_dry_run_records_nothing_and_says_what_it_would_hide(store: Store) -> None:
    before = {info.key: info.etag for info in store.list()}
    found = take_down(store, [uri_of(1)], **ASKED, dry_run=True)
    assert (found["record"], found["snapshots"]) == (None, {1: 2, 2: 2})
    assert {info.key: info.etag for info in store.list()} == before


def test_what_is_hidden_already_is_not_recorded_again(store: Store) -> None:
    take_down(store, [uri_of(1)], **ASKED)
    found = take_down(store, [uri_of(1), "b/dog", "a/dog"], **ASKED)
    assert found["already"] == [uri_of(1), f"{uri_of(1)}#b/dog"]
    assert found["samples"] == [[uri_of(0), "a/dog"]]
    assert found["snapshots"] == {1: 1, 2: 1}
    again = take_down(store, ["a/dog"], **ASKED)
    assert again["record"] is None
    assert len(recorded(store)) == 2


def test_undo_shows_the_rows_again_until_their_bytes_are_gone(store: Store) -> None:
    everything = loaded(store)
    key = take_down(store, [uri_of(1)], **ASKED)["record"]
    third = publish_all(store)
    assert third.counts["rows"] == 4
    found = undo(store, key.removeprefix("_takedowns/"), reason="a mistake", by="bob")
    assert (found["undone"], found["snapshots"]) == ([key], {1: 2, 2: 2, 3: 0})
    assert loaded(store, 2) == everything
    assert loaded(store, 3) < everything, "a snapshot that applied the takedown never had the rows"
    assert loaded(store, publish_all(store).number) == everything
    assert len(shown_by_view(store)) == 3
    (record,) = history(store)
    assert record["undone"]["by"] == "bob"
    with pytest.raises(InputError, match=r"no takedown of .* is called or names"):
        undo(store, key, reason="", by="")
    take_down(store, [uri_of(1)], **ASKED)
    (receipt,) = [item for item in Ledger(store).all() if item.shard.objects[0].uri == uri_of(1)]
    store.delete(receipt.files[0].key)
    with pytest.raises(OutputError, match="cannot be undone: bytes of its rows are gone"):
        undo(store, uri_of(1), reason="", by="")
    assert not read_takedowns(store).takes("s3://corpus/other.tar")
    assert read_takedowns(store).takes(uri_of(1))


def test_undo_of_one_name_keeps_the_others_of_its_record_hidden(store: Store) -> None:
    take_down(store, ["a/cat", uri_of(1)], **ASKED)
    found = undo(store, "a/cat", reason="", by="bob")
    assert len(found["again"]) == 1
    assert loaded(store) == {"a_cat", "a_dog", "c_cow", "both"}
    (record,) = read_takedowns(store).records
    assert (record.sources, record.samples, record.by) == ((uri_of(1),), (), "ann")


def test_undo_of_a_name_needs_only_the_bytes_of_that_name(store: Store, tmp_path: Path) -> None:
    """`lathe gc` deleted files of other names of the record, with their indexes; one of them is of the same tar."""
    clips = clips_of(3, ["d/ant", "d/bee", "d/bug"])
    clips[0] = replace(clips[0], plan=replace(clips[0].plan, bucket=Bucket(17, 48, 64)))
    clips[0] = replace(clips[0], latent_CTHW=clips[0].latent_CTHW.transpose(0, 1, 3, 2).copy())
    Ledger(store).commit(write_shard(store, tmp_path, WriteConfig(), clips, shard=3))
    record = take_down(store, ["d/ant", uri_of(1), "d/bee", "a/cat"], **ASKED)["record"]
    publish_all(store)
    aged(store)
    assert collect(store, NEWEST)["deleted"]["taken_down"]["files"] == 2
    deleted = read_record(store, record).deleted
    assert len(deleted) == 2, "of a source that is taken down as a whole they need not be listed"
    for name, hint in ((record, ".*can be undone: --undo NAME"), ("d/ant", ""), (uri_of(1), "")):
        with pytest.raises(OutputError, match=rf"bytes of its rows are gone: \S+ is deleted{hint}"):
            undo(store, name, reason="", by="")
    for name in ("d/bee", "a/cat"):
        undo(store, name, reason="", by="bob")
    publish_all(store)
    assert loaded(store) == {"a_cat", "a_dog", "both", "c_cow", "d_bee", "d_bug"}
    (left,) = read_takedowns(store).records
    assert (left.sources, left.samples) == ((uri_of(1),), ((uri_of(3), "d/ant"),))
    assert left.deleted == deleted, "readers need not look for these files"
    assert verify_output(store).problems == []


def test_a_key_is_looked_for_in_every_snapshot(store: Store) -> None:
    """The newest snapshot shows it of one source, an older one also of another."""
    listing = [item.shard.objects[0] for item in Ledger(store).all() if item.shard.objects[0].uri != uri_of(1)]
    publish_all(store, listing=listing, removed="drop")
    assert loaded(store) == {"a_cat", "a_dog", "c_cow", "both"}
    with pytest.raises(InputError, match=f"2 sources of .* have a sample 'both': {uri_of(1)}, {uri_of(2)}"):
        take_down(store, ["both"], **ASKED)
    found = take_down(store, [f"{uri_of(1)}#both"], **ASKED)
    assert found["snapshots"] == {1: 1, 2: 1, 3: 0}


def test_names_that_gc_replaced_by_hashes_are_taken_down_already(store: Store) -> None:
    (cow,) = [name for name in shown_ids(store, publish_all(store)) if name.startswith("c_cow")]
    take_down(store, ["a/cat", cow, "s3://corpus/later.tar"], **ASKED, allow_unknown=True)
    (record,) = read_takedowns(store).records
    store.write(record.key, record.without_names("then").to_json())
    for receipt in Ledger(store).all():
        for item in receipt.files:
            store.delete(item.key)
            store.delete(item.index_key)
    names = ["a/cat", f"{uri_of(0)}#a/cat", cow, "s3://corpus/later.tar"]
    found = take_down(store, names, **ASKED, allow_unknown=True)
    assert (found["record"], sorted(found["already"]), found["unknown"]) == (None, sorted(names), [])
    for name in names:
        with pytest.raises(OutputError, match="its bytes are gone, and its names were removed then"):
            undo(store, name, reason="", by="")
    with pytest.raises(InputError, match=r"no takedown of .* is called or names 'a/dog'"):
        undo(store, "a/dog", reason="", by="")


def test_records_without_names_hide_the_same_rows(store: Store) -> None:
    """As `lathe gc` leaves them. Clear names are in no record any more; publish, loader and verify go on as before."""
    (cow,) = [name for name in shown_ids(store, publish_all(store)) if name.startswith("c_cow")]
    take_down(store, [uri_of(1), "a/cat", cow], **ASKED)
    shown, view = loaded(store), shown_by_view(store)
    before = publish_all(store)
    (record,) = read_takedowns(store).records
    store.write(record.key, record.without_names("2026-11-29T00:00:00+00:00").to_json())
    data = store.read(record.key)
    for name in (uri_of(1), "a/cat", cow):
        assert name.encode() not in data
    assert read_record(store, record.key).uri_ids() == record.uri_ids()
    assert loaded(store) == loaded(store, 2) == shown
    assert publish_all(store).number == before.number, "nothing changed"
    assert shown_by_view(store) == view
    assert verify_output(store).problems == []
    assert take_down(store, [uri_of(1), cow], **ASKED)["already"] == [uri_of(1), cow]
    with pytest.raises(OutputError, match="its bytes are gone, and its names were removed"):
        undo(store, uri_of(1), reason="", by="")


def test_a_record_survives_its_json_in_both_forms_and_version_1_is_read() -> None:
    clear = Takedown(
        "_takedowns/x.json", "t", "r", ("u",), (("u", "k"),), (TakenRow("i", "u"),), "ann", deleted=("data/f",)
    )
    hashed = clear.without_names("then")
    for record in (clear, hashed):
        assert Takedown.from_json(record.key, record.to_json()) == record
    first = {"format_version": 1, "created": "t", "reason": "r", "sources": ["u"], "samples": [], "rows": []}
    assert Takedown.from_json("k", json.dumps(first).encode()) == Takedown("k", "t", "r", ("u",))
    assert hashed.uri_ids() == {uri_id("u")}
    assert Takedowns([hashed]).takes("u")
    for change in (
        {"hashed": {}},
        {"hashed": {"sources": ["xy"], "samples": [], "rows": []}},
        {"by": 5},
        {"deleted": [1]},
    ):
        with pytest.raises(ValueError, match=r"ha[sv]e? "):
            Takedown.from_json("k", json.dumps({**json.loads(hashed.to_json()), **change}).encode())


def test_a_takedown_that_was_killed_before_the_delta_view_is_found_and_mended(store: Store) -> None:
    record_takedown(store, "asked", sources=[uri_of(1)])  # all that such a takedown wrote
    (problem,) = verify_output(store, deep=False).problems
    assert "may show rows that were taken down" in problem.found
    take_down(store, ["a/cat"], **ASKED)
    assert verify_output(store, deep=False).problems == []
    assert len(shown_by_view(store)) == 1


def test_damaged_snapshots_do_not_keep_a_row_from_being_taken_down(store: Store) -> None:
    for number, name in ((1, "a/cat"), (2, uri_of(1))):  # the newest last: sources are found without it
        (table,) = store.keys(f"_snapshots/{number}/files-")
        whole = store.read(table)
        store.write(table, b"damaged")
        found = take_down(store, [name], **ASKED)
        assert found["record"] in recorded(store)
        assert f"rows of snapshot {number} are not counted" in found["notices"][0]
        store.write(table, whole)
    assert loaded(store) == {"a_dog", "c_cow", "both"}


def test_a_snapshot_that_gc_deletes_meanwhile_does_not_stop_a_takedown(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Snapshots.read

    def deleted_first(self: Snapshots, number: int) -> Snapshot:
        if number == 1:
            store.delete(snapshot_key(1))
        return read(self, number)

    monkeypatch.setattr(Snapshots, "read", deleted_first)
    found = take_down(store, ["a/cat"], **ASKED)
    assert (found["snapshots"], found["notices"]) == ({2: 1}, [])


def test_a_row_is_found_by_few_indexes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids begin with the sample's key, and the manifest has the range of each file."""
    read, keep = [], store.read
    monkeypatch.setattr(store, "read", lambda key: (read.append(key), keep(key))[1])
    take_down(store, ["c/cow"], **ASKED, dry_run=True)
    assert len({key for key in read if key.startswith("_index/")}) == 1


# --- paired videos ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("main", "depth", "rule"), [
    ("a.rgb.mp4", "a.depth.mp4", MemberRule((("depth", "depth.mp4"),), "rgb.mp4")),
    ("b.v1.mkv", "b.v1.depth.mp4", MemberRule((("depth", "depth.mp4"),))),
])  # fmt: skip
def test_a_paired_video_that_is_taken_down_takes_its_main_video_and_no_job_encodes_it_alone(
    tmp_path, main, depth, rule
):
    store, other = local_store(tmp_path), "s3://corpus/c.mp4"
    Ledger(store).prepare("films")
    main, depth = f"s3://corpus/{main}", f"s3://corpus/{depth}"
    members = (MemberObject("depth", depth, 10, "e2"),)
    shard = Shard("files", "some", (SourceObject(main, 10, "e1", members=members), SourceObject(other, 10, "e3")))
    rejects = tuple(Reject(uri, "clips", "too_short", "1 frame", True, uri=uri) for uri in (main, other))
    parts = PARTS | {"members": rule.to_dict()}
    receipt = replace(receipt_of((), None, rejects=rejects), shard=shard, fingerprint_parts=parts, empty=(main, other))
    Ledger(store).commit(replace(receipt, shard_id=shard.id(FINGERPRINT)))
    found = take_down(store, [depth], **ASKED)
    assert found["sources"] == [depth, main]
    taken = read_takedowns(store)
    assert [uri for uri in (main, depth, other) if taken.takes(uri)] == [main, depth]
    assert set(undo(store, found["record"], **ASKED)["undone"]) == {found["record"]}
    with pytest.raises(InputError, match=r"c\.depth\.mp4"):
        take_down(store, ["s3://corpus/c.depth.mp4"], **ASKED)
