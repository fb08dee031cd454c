"""Every Python block of docs/loader.md runs; that of ray.data where a session of Ray is open, in tests/pipeline/test_delta_log.py."""

from __future__ import annotations

import pytest

from pipeline.config import WriteConfig
from pipeline.ledger.takedowns import record_takedown
from tests.loader.document import DOCUMENT, blocks
from tests.loader.outputs import mixed_shards, write_output


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(("container", "reader"), [("parquet", "datasets"), ("tar", "webdataset")])
def test_blocks_of_the_document_run(tmp_path, monkeypatch, container, reader):
    output = write_output(tmp_path / "out", tmp_path, mixed_shards(2), WriteConfig(format=container))
    record_takedown(output.store, "asked", ids=["video00105-0000"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scope: dict[str, object] = {}
    for block in blocks(reader):
        exec(block, scope)
    assert (scope["resumed"].step, scope["loader"].step) == (3, 4)  # the loader went on as an iterable dataset
    assert len(scope["latents_BCthw"]) == len(scope["captions"]) == 2
    assert scope["first"].shape[1] == 4
    assert scope["hidden"] == {"video00105-0000"}
    assert sorted(scope["ids"]) == sorted(set(output.clips) - scope["hidden"])


def test_messages_of_the_document_are_those_of_the_code():
    folders = [DOCUMENT.parents[1] / "pipeline" / name for name in ("loader", "ledger")]
    source = "".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    for message in (
        "gives not one global batch",
        "fingerprints differ",
        "is damaged: its hash is",
        "could not be read",
    ):
        assert message in DOCUMENT.read_text()
        assert message in source
