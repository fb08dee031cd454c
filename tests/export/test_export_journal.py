"""Exports into one directory again: deltas, kills, damage, takedowns, directories of others."""

import json
import shutil
from dataclasses import replace

import pytest

from pipeline.errors import InputError, OutputError
from pipeline.export.fastvideo import FastVideo
from pipeline.export.journal import Journal
from pipeline.export.ltx2 import Ltx2
from pipeline.export.texts import TextTable
from tests.export.memory_rows import MemoryRows, files_in, run, wan_row, with_source, write_texts
from tests.export.test_export_fastvideo import WIDTH, as_the_trainer_reads
from tests.export.test_export_ltx2 import SOURCE, as_the_trainer_pairs, ltx_row


class Killed(BaseException):
    """A kill: nothing between it and the process may catch it."""


@pytest.fixture
def killed(monkeypatch):
    """Leaves the state as a kill does: nothing of the writer's own clean-up runs."""
    monkeypatch.setattr(Journal, "__exit__", lambda self, *error: self._lock.close())


class Folders:
    """Exports of both kinds (rows that share files, files of a row's own) with tables of texts that always cover the rows."""

    def __init__(self, folder, target):
        self.folder, self.target = folder, target
        self.out = folder / "out"

    def row(self, name, **facts):
        return wan_row(name) if self.target is FastVideo else ltx_row(name, **facts)

    def rows(self, *names):
        found = [self.row(name) for name in names]
        return MemoryRows(rows=found) if self.target is FastVideo else MemoryRows(SOURCE, found)

    def run(self, rows):
        width, tokens = (WIDTH, None) if self.target is FastVideo else (8, 4)
        texts = TextTable(write_texts(self.folder / "texts.parquet", rows.rows, width, tokens=tokens))
        return run(self.target, rows, self.out, texts=texts)

    def ids(self):
        if self.target is FastVideo:
            return sorted(row["id"] for path in self.out.rglob("*.parquet") for row in as_the_trainer_reads(path))
        assert len(list(self.out.rglob("latents/**/*.pt"))) == len(list(self.out.rglob("conditions/**/*.pt")))
        return sorted(as_the_trainer_pairs(self.out))


@pytest.fixture(params=[FastVideo, Ltx2])
def folders(request, tmp_path):
    return Folders(tmp_path, request.param)


def test_a_second_export_adds_what_is_new_and_reads_nothing_else(folders):
    folders.run(folders.rows("a", "b"))
    rows = folders.rows("a", "b", "c")
    report = folders.run(rows)
    assert (report.kept, report.added, report.removed, rows.reads) == (2, 1, 0, 1)
    assert folders.ids() == ["a", "b", "c"]
    again = folders.rows("a", "b", "c")
    report = folders.run(again)
    assert (report.kept, report.added, again.reads) == (3, 0, 0)


def test_rows_that_are_gone_or_changed_leave_the_directory(folders):
    folders.run(folders.rows("a", "b", "c"))
    rows = folders.rows("b", "c")
    rows.rows[1] = replace(rows.rows[1], metadata={"score": 2})
    report = folders.run(rows)
    assert (report.kept, report.added, report.removed) == (1, 1, 2)
    assert folders.ids() == ["b", "c"]


@pytest.mark.parametrize("files", [0, 1])
def test_a_killed_export_shows_no_torn_part_and_goes_on(folders, killed, monkeypatch, files):
    """Killed after `files` files of the second part were moved into place."""
    monkeypatch.setattr(folders.target, "part_rows", 2)
    place, moved = Journal._place, []

    def dying(self, written, path):
        if len(moved) == (1 if folders.target is FastVideo else 4) + files:
            raise Killed
        moved.append(path)
        return place(self, written, path)

    rows = folders.rows("a", "b", "c", "d", "e")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_place", dying)
        with pytest.raises(Killed):
            folders.run(rows)
    assert json.loads((folders.out / "_lathe_export.json").read_bytes())["complete"] is None
    rows.reads = 0
    folders.run(rows)
    assert folders.ids() == ["a", "b", "c", "d", "e"]
    assert rows.reads < 5, "the finished part was kept"


def test_a_row_that_was_taken_down_during_a_killed_export_does_not_stay(folders, killed, monkeypatch):
    begin = Journal.begin

    def dying(self, part):
        if part.done:
            raise Killed
        begin(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "begin", dying)
        with pytest.raises(Killed):
            folders.run(folders.rows("a", "b"))
    assert folders.ids() == ["a", "b"], "its files are there, though not yet recorded as done"
    folders.run(folders.rows("b"))
    assert folders.ids() == ["b"]


def test_files_that_were_lost_or_cut_off_are_made_again(folders):
    folders.run(folders.rows("a", "b"))
    first, *_ = [folders.out / name for name in files_in(folders.out)]
    first.write_bytes(first.read_bytes()[:100])
    report = folders.run(folders.rows("a", "b"))
    assert report.repaired == 2
    assert folders.ids() == ["a", "b"]
    (folders.out / files_in(folders.out)[0]).unlink()
    folders.run(folders.rows("a", "b"))
    assert folders.ids() == ["a", "b"]


def test_directories_of_others_are_refused(folders):
    folders.out.mkdir()
    (folders.out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'thesis.txt' and is not an export of Lathe"):
        folders.run(folders.rows("a"))
    assert [path.name for path in folders.out.iterdir()] == ["thesis.txt"]
    (folders.out / "thesis.txt").unlink()
    folders.run(folders.rows("a"))
    with pytest.raises(OutputError, match=r"differs in source: '0123' there, '4567' now"):
        folders.run(with_source(folders.rows("a"), uuid="4567"))
    with pytest.raises(OutputError, match=r"differs in where: None there, 'fps > 3' now"):
        folders.run(with_source(folders.rows("a"), where="fps > 3"))
    spec = {**folders.rows("a").source.spec, "std": [1.0] * folders.rows("a").source.spec["latent_channels"]}
    with pytest.raises(OutputError, match="differs in constants"):
        folders.run(with_source(folders.rows("a"), spec=spec))
    (folders.out / "_lathe_export.json").write_text("{}")
    with pytest.raises(OutputError, match="not the manifest of an export"):
        folders.run(folders.rows("a"))


def test_a_file_of_others_that_the_trainer_would_read_is_refused(tmp_path):
    folders = Folders(tmp_path, FastVideo)
    folders.run(folders.rows("a"))
    shutil.copy(folders.out / files_in(folders.out)[0], folders.out / "extra.parquet")
    with pytest.raises(OutputError, match=r"holds extra.parquet, which no export made"):
        folders.run(folders.rows("a", "b"))


def test_two_exports_at_once_are_refused(folders):
    rows = folders.rows("a")
    folders.run(rows)
    identity = json.loads((folders.out / "_lathe_export.json").read_bytes())["identity"]
    with Journal(folders.out, identity), pytest.raises(OutputError, match="being written by another export"):
        folders.run(rows)


def test_caches_that_fastvideo_would_trust_go_with_a_change_only(tmp_path):
    folders = Folders(tmp_path, FastVideo)
    folders.run(folders.rows("a"))
    names = ["map_style_cache/file_info.pkl", "sharding_info_1_sp_groups_2_workers/shard_total_samples.pkl"]
    for name in names:
        (path := folders.out / "5x32x48" / name).parent.mkdir()
        path.write_bytes(b"stale")
    assert folders.run(folders.rows("a")).caches_removed == []
    assert folders.run(folders.rows("a", "b")).caches_removed == [f"5x32x48/{name}" for name in names]
    assert files_in(folders.out) == ["5x32x48/part-000001.parquet", "5x32x48/part-000002.parquet"]


def test_an_empty_snapshot_removes_nothing(folders):
    rows = folders.rows("a")
    folders.run(rows)
    texts = TextTable(folders.folder / "texts.parquet")
    with pytest.raises(InputError, match="has no row to export"):
        run(folders.target, replace(rows, rows=[]), folders.out, texts=texts)
    assert folders.ids() == ["a"]


def test_latents_are_in_memory_a_few_at_a_time(folders):
    rows = folders.rows(*(f"r{n}" for n in range(20)))
    folders.run(rows)
    assert rows.reads == 20
    assert rows.most <= 3
