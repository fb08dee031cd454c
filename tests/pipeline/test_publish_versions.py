"""Which inputs the next snapshot holds: dropped ones stay dropped, open ones stop it, under every fingerprint."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import InputError, PublishFailed
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.publish_checks import Limits
from pipeline.operate.status import status
from tests.pipeline.frameless_build import FINGERPRINT, row_id
from tests.pipeline.published import listed, publish_all, shown_ids

OTHER = "e" * 32
ALL = Limits(removed=1.0)


@pytest.fixture
def films(workspace: SimpleNamespace) -> SimpleNamespace:
    """A workspace whose output is a latent set."""
    Ledger(workspace.store).prepare("films")
    return workspace


def ids(workspace: SimpleNamespace, names: str, *fingerprints: str) -> list[str]:
    """Ids of the rows of these files as they are now."""
    sources = {Path(source.uri).stem: source for source in listed(workspace)}
    return sorted(row_id(sources[name].uri, sources[name].etag, each) for name in names for each in fingerprints)


def remove(workspace: SimpleNamespace, names: str) -> None:
    for name in names:
        (workspace.folder / f"{name}.mp4").unlink()


# --- dropped inputs ----------------------------------------------------------------------------------------------------


def test_dropped_inputs_do_not_return_with_a_publish_of_another_fingerprint(films: SimpleNamespace) -> None:
    films.run("abc").finish()
    films.run("abc", fingerprint=OTHER).finish()
    remove(films, "adef")
    kept = ids(films, "bc", FINGERPRINT, OTHER)
    assert publish_all(films.store, listing=listed(films), removed="drop").counts["rows"] == len(kept)
    one = publish_all(films.store, fingerprint=OTHER[:4])
    assert shown_ids(films.store, one) == ids(films, "bc", OTHER)
    both = publish_all(films.store)
    assert shown_ids(films.store, both) == kept
    assert (both.changes["inputs_added"], both.changes["inputs_removed"]) == (2, 0)
    assert shown_ids(films.store, publish_all(films.store, fingerprint=FINGERPRINT[:4])) == ids(
        films, "bc", FINGERPRINT
    )
    assert shown_ids(films.store, publish_all(films.store)) == kept


def test_inputs_are_dropped_within_the_published_fingerprint(films: SimpleNamespace) -> None:
    films.run("abc").finish()
    films.run("abc", fingerprint=OTHER).finish()
    every = ids(films, "a", FINGERPRINT)
    remove(films, "adef")
    publish_all(films.store, listing=listed(films), removed="drop", fingerprint=OTHER[:4])
    assert shown_ids(films.store, publish_all(films.store)) == sorted([*ids(films, "bc", FINGERPRINT, OTHER), *every])


def test_a_dropped_input_that_is_encoded_unchanged_counts_again(films: SimpleNamespace) -> None:
    films.run("abc").finish()
    expected = ids(films, "abc", FINGERPRINT)
    path = films.folder / "a.mp4"
    data = path.read_bytes()
    remove(films, "adef")
    publish_all(films.store, listing=listed(films), removed="drop")
    publish_all(films.store, fingerprint=FINGERPRINT[:4])
    path.write_bytes(data)  # with a new etag: the next build finds the same bytes
    films.run("a").finish()
    assert shown_ids(films.store, publish_all(films.store)) == expected


def test_dropping_most_inputs_at_once_fails_unless_it_is_allowed(films: SimpleNamespace) -> None:
    films.run("abcdef").finish()
    publish_all(films.store)
    kept = ids(films, "ef", FINGERPRINT)
    remove(films, "abcd")
    with pytest.raises(PublishFailed) as caught:
        publish_all(films.store, listing=listed(films), removed="drop")
    (check,) = [check for check in caught.value.checks if check.name == "removed"]
    assert "removed: 4 of 6 inputs (66.7%) and 4 of 6 rows (66.7%) would be dropped" in str(caught.value)
    assert "the limit is 50.0%; check that the inputs are complete, or raise --max-removed" in str(caught.value)
    assert (check.numbers["inputs_removed"], check.numbers["rows_before"], check.ok) == (4, 6, False)
    made = publish_all(films.store, listing=listed(films), removed="drop", limits=Limits(removed=0.7))
    assert shown_ids(films.store, made) == kept
    again = publish_all(films.store, listing=listed(films), removed="drop")
    assert again == made, "what was dropped before does not count once more"


def test_the_first_snapshot_is_not_emptied_either(films: SimpleNamespace) -> None:
    films.run("abc").finish()
    with pytest.raises(PublishFailed, match=r"removed: 3 of 3 inputs \(100.0%\)"):
        publish_all(films.store, listing=[], removed="drop")
    assert publish_all(films.store, listing=[], removed="drop", limits=ALL).counts["rows"] == 0


def test_one_large_input_among_small_ones_is_judged_by_its_rows(films: SimpleNamespace, tmp_path: Path) -> None:
    """Replaced inputs and takedowns are not removals."""
    films.run("abcdef").finish()
    record_takedown(films.store, "asked", sources=[str(films.folder / "e.mp4")])
    publish_all(films.store)
    remove(films, "d")
    for name in "abc":
        (films.folder / f"{name}.mp4").write_bytes(b"another" + name.encode())
    record_takedown(films.store, "asked", sources=[str(films.folder / "f.mp4")])
    films.run("abc").finish()
    made = publish_all(films.store, listing=listed(films), removed="drop")
    (check,) = [check for check in made.checks if check.name == "removed"]
    numbers = {name: check.numbers[name] for name in ("inputs_removed", "inputs_before", "rows_removed", "rows_before")}
    assert numbers == {"inputs_removed": 1, "inputs_before": 6, "rows_removed": 1, "rows_before": 5}


def test_rows_of_a_file_that_came_and_went_are_both_counted(films: SimpleNamespace) -> None:
    """As `diff` counts them, not their difference."""
    path = films.folder / "a.mp4"
    before, data = path.stat(), path.read_bytes()
    films.run("abc").finish()
    path.write_bytes(b"v2 of a")
    films.run("ad", "storage.files_per_shard=64").finish()
    record_takedown(films.store, "asked", sources=[str(films.folder / "c.mp4")])
    publish_all(films.store)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_mtime_ns,) * 2)
    record_takedown(films.store, "asked", sources=[str(films.folder / "b.mp4")])
    changes = publish_all(films.store, listing=listed(films), partial=True).changes
    assert (changes["files_added"], changes["files_dropped"]) == (0, 0)
    assert (changes["rows_added"], changes["rows_dropped"]) == (1, 2)


def test_inputs_of_another_fingerprint_are_not_changes(films: SimpleNamespace) -> None:
    """A snapshot of one fingerprint after one of all drops the rows of the others, not their inputs."""
    films.run("abc").finish()
    films.run("abc", fingerprint=OTHER).finish()
    names = ("inputs_added", "inputs_removed", "rows_added", "rows_dropped")
    found = []
    for prefix in (None, OTHER, None):
        changes = publish_all(films.store, fingerprint=prefix).changes
        found.append(tuple(changes[name] for name in names))
    assert found == [(6, 0, 6, 0), (0, 0, 0, 3), (3, 0, 3, 0)]


# --- what is open ------------------------------------------------------------------------------------------------------


def test_a_half_done_encoding_under_new_settings_is_open(films: SimpleNamespace) -> None:
    films.run("abcdef").finish()
    films.run("ab", fingerprint=OTHER).finish()
    with pytest.raises(PublishFailed, match=r"4 shards or inputs are not done under fingerprint eeeeeeee, .*c\.mp4"):
        publish_all(films.store, listing=listed(films))
    assert len(publish_all(films.store, listing=listed(films), partial=True).open_shards) == 4
    assert publish_all(films.store, listing=listed(films), fingerprint=FINGERPRINT[:4]).open_shards == ()
    films.run("cdef", fingerprint=OTHER).finish()
    assert publish_all(films.store, listing=listed(films)).open_shards == ()


def test_inputs_found_again_under_new_settings_are_done(films: SimpleNamespace) -> None:
    films.run("abcdef").finish()
    films.run("abcdef", fingerprint=OTHER).finish()
    path = films.folder / "a.mp4"
    path.write_bytes(path.read_bytes() + b"")
    films.run("a", fingerprint=OTHER).finish()  # a receipt that says: unchanged
    assert publish_all(films.store, listing=listed(films)).open_shards == ()


def heartbeat(films: SimpleNamespace, build: str, **facts: object) -> None:
    known = {"build": build, "running": True, "shards_total": 7, "shards_done": 2, "every_s": 3e3, "frames_per_s": 1.0}
    told = {**known, "updated": time.time(), "started": 1.0, "fingerprint": FINGERPRINT, **facts}
    films.store.write(Ledger(films.store).layout.progress_key(build), json.dumps(told).encode())


def test_every_running_build_is_open_and_shown(films: SimpleNamespace) -> None:
    films.run("abcdef").finish()
    heartbeat(films, "b1", started=1.0)
    heartbeat(films, "b2", started=2.0, shards_done=7)
    heartbeat(films, "b3", started=3.0, shards_done=4, fingerprint=OTHER)
    heartbeat(films, "b4", started=4.0)  # killed long ago
    os.utime(films.store.uri(Ledger(films.store).layout.progress_key("b4")), (0, 0))
    heartbeat(films, "b5", started=0.5, updated=time.time() - 1e6, shards_done=7)  # on a machine whose clock is behind
    films.store.write(Ledger(films.store).layout.progress_key("b6"), b"")  # killed while it was written
    words = (
        "8 shards or inputs are not done: 5 shards of the running build b1, 3 shards of the running build b3; finish .* publish with the "
        r"inputs to wait only for these, .*A build that was killed stops counting without a heartbeat: b1 in 2h\d\dm, b3 in 2h"
    )
    with pytest.raises(PublishFailed, match=words):
        publish_all(films.store)
    with pytest.raises(PublishFailed, match="5 shards or inputs are not done: 5 shards of the running build b1"):
        publish_all(films.store, fingerprint=FINGERPRINT[:4])
    made = publish_all(films.store, partial=True)
    assert made.open_shards == ("5 shards of the running build b1", "3 shards of the running build b3")
    found = status(films.store)
    assert (found["progress"]["build"], [item["build"] for item in found["other_builds"]]) == ("b3", ["b5", "b1", "b2"])
    from pipeline.cli.wording import status_lines

    assert [line.strip().split(": ")[1].split(",")[0] for line in status_lines(found) if "build  " in line] == [
        "4/7 shards",
        "7/7 shards",
        "2/7 shards",
        "7/7 shards",
        "killed",
    ]


def test_listed_inputs_that_are_done_do_not_wait_for_a_running_build(films: SimpleNamespace) -> None:
    """It was killed and still counts as running, or it encodes other inputs."""
    films.run("abcdef").finish()
    heartbeat(films, "b1")
    made = publish_all(films.store, listing=listed(films))
    assert (made.counts["rows"], made.open_shards) == (6, ())
    (films.folder / "g.mp4").write_bytes(b"new")
    with pytest.raises(PublishFailed, match=r"1 shard or input is not done: \S*g\.mp4; finish"):
        publish_all(films.store, listing=listed(films))


def test_an_unknown_fingerprint_names_those_there_are(films: SimpleNamespace) -> None:
    films.run("ab").finish()
    films.run("ab", fingerprint=OTHER).finish()
    with pytest.raises(InputError, match="no receipt of fingerprint zz; there are eeeeeeee, ffffffff"):
        publish(films.store, PublishOptions(fingerprint="zz"))


def test_status_of_a_snapshot_has_the_warnings_of_its_receipts(films: SimpleNamespace) -> None:
    from dataclasses import replace

    (receipt,) = films.run("abc").finish().committed
    key = Ledger(films.store).layout.receipt_key(receipt.shard_id)
    films.store.write(key, replace(receipt, warnings={"no_caption": 3, "dark": 1}).to_json())
    shutil.rmtree(Path(films.store.uri("_summaries/")), ignore_errors=True)
    before = status(films.store)["warnings"]
    publish_all(films.store)
    assert status(films.store)["warnings"] == before == {"no_caption": 3, "dark": 1}
    films.run("def").finish()
    assert publish_all(films.store).warnings == before, "kept in the tables of the parent"
