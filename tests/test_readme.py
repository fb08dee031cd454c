"""README.md: its commands are understood by the command line, its Python reads a real output. Links and paths of all pages exist."""

import re
import shlex

import numpy as np
import pytest
import typer

import pipeline
from pipeline.cli import app as cli
from tests.deploy.manifests import ROOT, job_of
from tests.tiny_corpus import rows, tiny_job, video_bytes, write_tar

TEXT = (ROOT / "README.md").read_text()
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
    command = command.split(" -- ")[-1]
    words = shlex.split(command)
    if "encode" in words:
        job_of(command, monkeypatch)
    else:
        typer.main.get_command(cli.app).commands[words[1]].make_context(words[1], words[2:])


def test_its_python_reads_every_row_of_an_output(tmp_path):
    corpus = write_tar(tmp_path / "a.tar", {key: {"mp4": video_bytes(9), "txt": key.encode()} for key in ("x", "y")})
    pipeline.encode(tiny_job(corpus, tmp_path / "out", **{"write.dtype": "float16"}))
    reading, metadata = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "pyarrow" in block)
    found = []
    program = reading + "                found.append((caption, latent_CTHW))\n"
    exec(program.replace("my/latents", str(tmp_path / "out")), {"found": found})
    stored = sorted((row["caption"], row["vae_latent_bytes"]) for row in rows(tmp_path / "out").values())
    assert sorted((caption, latent.tobytes()) for caption, latent in found) == stored
    assert found[0][1].ndim == 4
    assert found[0][1].dtype == np.float16
    names: dict = {}
    exec(metadata.replace("my/latents", str(tmp_path / "out")), names)
    assert names["constants"].keys() == {"applied", "scale", "shift", "mean", "std"}


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
    named = re.findall(r"`((?:pipeline|model|tests|benchmarks|docs|deploy)/[\w/.-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
