"""`lathe export --sidecar`: trainers get the embeddings of sidecar sets; rows without them are refused before anything is written."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import StorageConfig
from pipeline.embedding.pruning import prune
from pipeline.errors import ConfigError, InputError, OutputError
from pipeline.export.targets import Request, export_output
from pipeline.ledger.takedowns import record_takedown
from pipeline.sidecars.description import SidecarSet
from tests.export.memory_rows import files_in
from tests.export.test_export_tars import samples_of
from tests.loader.outputs import SHORT, Output, clip_of, write_output
from tests.sidecars.sets import BYTES, TEXT, copied, values_of, write_set

CAPTIONS = ["a dog", "a cat runs", None, "a dog"]
FASTVIDEO = Request("fastvideo", as_model="custom", normalize="none", sidecars=("t5",))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("output")
    clips = [clip_of(seed, SHORT, caption=caption, uri="s3://corpus/a.tar") for seed, caption in enumerate(CAPTIONS)]
    return write_output(folder / "out", folder / "spool", [clips])


@pytest.fixture
def output(made: Output, tmp_path: Path) -> Output:
    return copied(made, tmp_path)


def whole_set(output: Output, folder: Path) -> None:
    write_set(output.store, [["", "a dog"], ["a cat runs"]], folder=folder / "set")


def test_fastvideo_gets_the_embedding_of_each_caption_at_its_true_length(output: Output, tmp_path: Path) -> None:
    whole_set(output, tmp_path)
    report = export_output(output.uri, str(tmp_path / "fast"), FASTVIDEO)
    assert report.rows == len(CAPTIONS)
    rows = [row for name in files_in(tmp_path / "fast") for row in pq.read_table(tmp_path / "fast" / name).to_pylist()]
    assert len(rows) == len(CAPTIONS)
    for row in rows:
        found = np.frombuffer(row["text_embedding_bytes"], np.float32).reshape(row["text_embedding_shape"])
        assert np.array_equal(found, values_of(row["caption"])["embedding"]), row["caption"]
    record_takedown(output.store, "asked for", ids=[rows[0]["id"]])
    assert export_output(output.uri, str(tmp_path / "fast"), FASTVIDEO).removed == 1
    write_set(output.store, [["", "a dog", "a cat runs"]], _other(), folder=tmp_path / "set")
    with pytest.raises(OutputError, match="another"):
        export_output(output.uri, str(tmp_path / "fast"), Request("fastvideo", "custom", "none", sidecars=("other",)))


def test_sets_without_rows_or_of_one_fingerprint_are_told_apart(output: Output, tmp_path: Path) -> None:
    """Imported sets of one --about have one fingerprint; a set by id that was pruned may have no row."""
    whole_set(output, tmp_path)
    export_output(output.uri, str(tmp_path / "fast"), FASTVIDEO)
    write_set(output.store, [["", "a dog", "a cat runs"]], replace(TEXT, name="twin"), folder=tmp_path / "set")
    with pytest.raises(OutputError, match=r"differs in .*sidecars.*'t5 .*'twin "):
        export_output(output.uri, str(tmp_path / "fast"), replace(FASTVIDEO, sidecars=("twin",)))
    write_set(output.store, [["gone"]], BYTES, folder=tmp_path / "set")
    prune(output.store, BYTES.name, StorageConfig())
    with pytest.raises(InputError, match="--sidecar pixels lacks 4 of 4 rows by id"):
        export_output(output.uri, str(tmp_path / "new"), replace(FASTVIDEO, sidecars=("pixels",)))


def _other() -> SidecarSet:
    return replace(TEXT, name="other", parts={"encoder": "other"})


def test_tars_get_tensors_of_several_sets_by_name(output: Output, tmp_path: Path) -> None:
    whole_set(output, tmp_path)
    write_set(output.store, [sorted(output.clips)], BYTES, folder=tmp_path / "set")
    request = Request(
        "wds",
        normalize="none",
        members=("caption=txt", "text=text.pt", "text.pooled=pooled.pt", "text.image=image.npy"),
        sidecars=("t5@1", "image=pixels.embedding"),
    )
    export_output(output.uri, str(tmp_path / "wds"), request)
    tars = [tmp_path / "wds" / name for name in files_in(tmp_path / "wds") if name.endswith(".tar")]
    samples = {key: members for path in tars for key, members in samples_of(path).items()}
    assert samples.keys() == output.clips.keys()
    for key, sample in samples.items():
        wanted = values_of(sample["txt"].decode())
        text = torch.load(io.BytesIO(sample["text.pt"]), weights_only=True)
        assert text.dtype == torch.bfloat16
        assert np.array_equal(text.float().numpy(), wanted["embedding"])
        assert np.array_equal(torch.load(io.BytesIO(sample["pooled.pt"]), weights_only=True).numpy(), wanted["pooled"])
        image = np.load(io.BytesIO(sample["image.npy"]))
        assert np.array_equal(image, values_of(key, tokens=2)["embedding"].astype(np.float16))


def test_what_does_not_fit_is_refused_before_anything_is_written(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [["", "a dog"]], folder=tmp_path / "set")
    out = str(tmp_path / "fast")

    def refused(match: str, **options: object) -> None:
        with pytest.raises((InputError, ConfigError), match=match):
            export_output(output.uri, out, Request("fastvideo", "custom", "none", **options))  # type: ignore[arg-type]

    refused(r"--sidecar t5 lacks 1 of 4 rows by caption: .*'a cat runs'", sidecars=("t5",))
    refused(r"fastvideo trains on text embeddings.* give them as --sidecar SET")
    refused(r"no sidecar set 'clip'; there are t5", sidecars=("clip",))
    refused(r"expected SET, or NAME=SET.TENSOR", sidecars=("clip=t5",))
    refused(r"the set has the tensors embedding, pooled, not hidden", sidecars=("embedding=t5.hidden",))
    refused(r"expected embedding \[tokens, width\] among them", sidecars=("x=t5.pooled",))
    refused(r"expected each name once", sidecars=("t5", "t5@1"))
    refused(r"not both", sidecars=("t5",), text_embeddings="table.parquet")
    with pytest.raises(InputError, match=r"has embeddings of 1 to 3 tokens; AutoModel concatenates them"):
        export_output(output.uri, out, Request("automodel", "custom", "none", sidecars=("t5",)))
    assert not [name for name in files_in(tmp_path / "fast") if "part-" in name]
