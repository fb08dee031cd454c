"""docs/mixed-corpus.md: its job over tars, images, paired videos and a table gives rows that its loader block and two exports take."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import yaml
from PIL import Image

import pipeline
from pipeline.config import StorageConfig, build_job
from pipeline.export.targets import Request, export_output
from pipeline.operate.publish import PublishOptions, publish
from pipeline.storage import open_store
from tests.sidecars.sets import TEXT, write_set
from tests.tiny_corpus import tiny_job, video_bytes, write_tar

DOCUMENT = (Path(__file__).parents[2] / "docs" / "mixed-corpus.md").read_text()


def block(language: str) -> str:
    return DOCUMENT.split(f"```{language}\n")[1].partition("```")[0]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The document's job with the tiny network and small clips; published, with a set of text embeddings."""
    folder = tmp_path_factory.mktemp("mixed")
    corpus = folder / "corpus"
    for name in ("tars", "photos", "pairs"):
        (corpus / name).mkdir(parents=True)
    video, notes = video_bytes(24), []
    for n in range(2):
        write_tar(corpus / "tars" / f"{n}.tar", {f"v{n}": {"mp4": video}})
        notes += [[f"tars/{n}.tar", f"v{n}", start, start + 1.25, f"cut {start}"] for start in (0, 1.5)]
        Image.new("RGB", (64, 64), (n, 99, 200)).save(corpus / "photos" / f"p{n}.png")
        (corpus / "photos" / f"p{n}.txt").write_text("a photo")
        (corpus / "pairs" / f"d{n}.mp4").write_bytes(video_bytes(24, seed=n))
        (corpus / "pairs" / f"d{n}.depth.mp4").write_bytes(video)
        notes.append([f"pairs/d{n}.mp4", "", 0.25, 3, "a walk"])
    with (corpus / "notes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "key", "start", "end", "caption"], *notes])
    values = yaml.safe_load(block("yaml"))
    values["clips"] |= {"frames": [9], "size": ["32x32"]}
    values["model"] = tiny_job("in", "out").model.model_dump()
    values |= {"engine": {"executor": "inline", "decoders": 1}, "progress": "none"}
    before = os.getcwd()
    os.chdir(folder)
    try:
        report = pipeline.encode(build_job(values))
    finally:
        os.chdir(before)
    assert (report.counts.samples, report.counts.rejected, report.counts.clips) == (6, 0, 10)
    store = open_store(str(folder / "latents"), StorageConfig())
    publish(store, PublishOptions(delta=False))
    write_set(store, [["cut 0", "cut 1.5", "a photo", "a walk", ""]], TEXT, folder=folder / "sets")
    return folder


def test_the_loader_block_gives_paired_batches_with_text_and_conditions(output, monkeypatch):
    monkeypatch.chdir(output)
    scope = {}
    exec(block("python").replace("umt5", "t5"), scope)
    batch = scope["batch"]
    assert batch.latents.shape == batch.i2v_cond.shape == batch.members["control"].shape
    assert batch.captions == ["a walk", "a walk"]
    assert [len(text) for text in batch.sidecars["t5"]["embedding"]] == [3, 3]


def test_all_rows_are_exported_with_their_text_to_two_targets(output, tmp_path):
    uri, members = str(output / "latents"), ("latent=latent.pt", "text=text.pt", "caption=prompt.txt")
    plain = export_output(
        uri, str(tmp_path / "plain"), Request("wds", normalize="none", members=members, sidecars=("t5",))
    )
    other = Request("fastvideo", as_model="custom", normalize="none", sidecars=("t5",))
    assert plain.rows == export_output(uri, str(tmp_path / "fv"), other).rows == 10
