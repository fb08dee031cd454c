"""README.md: its commands are understood by the command line, its Python reads a real output. Links and paths of all pages exist."""

import re
import shlex

import numpy as np
import pytest
import typer

import pipeline
from pipeline.cli import app as cli
from pipeline.cli import output_commands
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.publish import PublishOptions, publish
from pipeline.storage.local import LocalStore
from tests.deploy.manifests import ROOT, job_of
from tests.pipeline.published import shown_ids
from tests.tiny_corpus import rows, tiny_job, video_bytes

TEXT = (ROOT / "README.md").read_text()
FORMATS = (ROOT / "docs" / "formats.md").read_text()
COMMANDS = [
    line.split("  #")[0]
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("lathe ", "ray job submit"))
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "deploy" / "README.md"]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, monkeypatch):
    monkeypatch.setattr(output_commands, "publish_job", lambda job: None)
    command = command.split(" -- ")[-1]
    words = shlex.split(command)
    if "encode" in words:
        job_of(command, monkeypatch)
    else:
        typer.main.get_command(cli.app).commands[words[1]].make_context(words[1], words[2:])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two snapshots of three plain videos in one file: in the second a video is replaced and a row taken down. Yields folder and store."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("kept", "replaced", "taken"):
        (folder / f"{name}.mp4").write_bytes(video_bytes(9, seed=len(name)))
        (folder / f"{name}.txt").write_text(name)
    store = LocalStore(str(folder / "out"))
    job = tiny_job([str(folder / "*.mp4")], folder / "out", **{"write.dtype": "float16"})
    pipeline.encode(job)
    publish(store, PublishOptions())
    (folder / "replaced.mp4").write_bytes(video_bytes(9, seed=99))
    (folder / "replaced.txt").write_text("new")
    pipeline.encode(job)
    publish(store, PublishOptions())
    (first, *_) = (row["id"] for row in rows(folder / "out").values() if row["caption"] == "taken")
    record_takedown(store, "asked", ids=[first])
    return folder, store, first


def python_block(word):
    """The only Python block with this word, of the README and the recipe for snapshots in docs/formats.md."""
    text = TEXT + FORMATS.partition("### Reading a snapshot")[2]
    (found,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in block)
    return found


@pytest.mark.parametrize(("number", "captions"), [(1, {"kept", "replaced"}), (2, {"kept", "new"})])
def test_its_loop_reads_the_rows_of_a_snapshot_without_those_taken_down(published, number, captions):
    folder, store, taken = published
    program = python_block("os.pread").replace("my/latents", str(folder / "out")).replace("1.json", f"{number}.json")
    found = []
    exec(program + '            found.append((row["id"], caption, latent_CTHW))\n', {"found": found})
    assert sorted(name for name, _, _ in found) == shown_ids(store, Snapshots(store).read(number))
    assert taken not in {name for name, _, _ in found}
    assert {caption for _, caption, _ in found} == captions
    stored = rows(folder / "out")
    assert all(latent.tobytes() == stored[name]["vae_latent_bytes"] for name, _, latent in found)
    assert (found[0][2].ndim, found[0][2].dtype) == (4, np.float16)


def test_its_training_loop_reads_every_row_of_the_snapshot(published):
    folder, store, _ = published
    program = python_block("LatentLoader").replace("my/latents", str(folder / "out"))
    program = program.replace("batch=16", "batch=1").replace(', normalize="model"', "")  # of an untrained network
    names: dict = {"found": []}
    exec(program + "    found += batch.ids\n", names)
    snapshot = Snapshots(store).read(1)
    assert set(names["found"]) == set(shown_ids(store, snapshot))  # another row stands in for the one taken down
    assert len(names["found"]) == snapshot.counts["rows"]
    assert names["state"]["step"] == len(names["found"])
    assert names["latents_BCTHW"].shape == (1, 4, 2, 4, 4)


def test_its_constants_are_in_the_files(published):
    names: dict = {}
    exec(python_block("normalisation").replace("my/latents", str(published[0] / "out")), names)
    assert names["constants"].keys() == {"applied", "scale", "shift", "mean", "std"}


def test_its_other_engines_read_the_output(published, monkeypatch, tmp_path):
    folder, store, _ = published
    publish(store, PublishOptions())  # makes the Delta view anew, without what was taken down
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", str(tmp_path)
    )  # the variable counts at the first import only
    lines = [line for line in python_block("scan_delta").splitlines() if "ray.data" not in line]
    assert len(lines) >= 5
    names: dict = {}
    exec("\n".join(lines).replace('"latents', f'"{folder / "out"}'), names)
    everything = rows(folder / "out")
    assert set(names["files"]["id"]) == set(everything)
    assert set(names["first"]["id"]) <= set(everything)
    assert names["newest"].count_rows() == sum(count for _, count in names["buckets"]) > 0


def anchors(page) -> set[str]:
    """Names that a link into a Markdown page may have behind `#`, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`((?:pipeline|model|examples|tests|benchmarks|docs|deploy)/[\w/.-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
