"""Text encoders: what they store is what transformers computes for each text alone; what does not fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.config import EmbedJob, validate
from pipeline.embedding.checkpoint import describe, find_files, hash_weights, local_folder
from pipeline.embedding.texts import TextEncoder
from pipeline.errors import CheckpointError, ConfigError
from pipeline.format.tensors import stored_values
from pipeline.storage import open_store

TEXTS = ["", "a cat runs", "the red dog sleeps on the snow in a blue video", "a dog", "Ein Café"]


def job_of(folder: Path, encoder: str = "t5", **options: Any) -> EmbedJob:
    values = {
        "output": "out",
        "encoder": encoder,
        "checkpoint": str(folder),
        "compute_dtype": "float32",
        "dtype": "float32",
    }
    return validate(EmbedJob, {**values, **options})


def encoded(job: EmbedJob, texts: list[str] = TEXTS) -> dict[str, Any]:
    return {texts[one.place]: one for one in TextEncoder(job, find_files(job), "cpu").encode(texts)}


@pytest.mark.parametrize(
    ("name", "encoder", "model", "options"),
    [
        ("t5", "t5", "T5EncoderModel", {}),
        ("t5", "t5", "T5EncoderModel", {"batch_tokens": 5, "layer": 1}),
        ("umt5", "umt5", "UMT5EncoderModel", {}),
        ("clip", "clip", "CLIPTextModel", {"layer": -2}),
        ("gemma", "gemma", "Gemma2ForCausalLM", {"template": "Describe video : {} 0"}),
    ],
)
def test_each_text_has_the_values_of_transformers_at_its_true_length(
    encoder_folders: dict[str, Path], name: str, encoder: str, model: str, options: dict[str, Any]
) -> None:
    job = job_of(encoder_folders[name], encoder, **options)
    plain = getattr(transformers, model).from_pretrained(encoder_folders[name]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folders[name])
    found = encoded(job)
    assert set(found) == set(TEXTS)
    for text in TEXTS:
        ids = tokenizer(job.template.replace("{}", text), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            output = plain(input_ids=ids, output_hidden_states=True)
        wanted = output.hidden_states[job.layer][0] if "last_hidden_state" not in output or job.layer != -1 else None
        wanted = output.last_hidden_state[0] if wanted is None else wanted
        assert found[text].tensors["embedding"].shape == (ids.shape[1], 32)
        np.testing.assert_allclose(found[text].tensors["embedding"], wanted.numpy(), atol=1e-5)
        if encoder == "clip":
            np.testing.assert_allclose(found[text].tensors["pooled"], output.pooler_output[0].numpy(), atol=1e-5)


def test_long_texts_are_cut_off_and_said_so_and_instructions_are_not_stored(encoder_folders: dict[str, Path]) -> None:
    job = job_of(encoder_folders["t5"], max_tokens=4, template="Describe : {}", skip_tokens=2)
    found = encoded(job)
    assert {text: (one.tokens, one.truncated) for text, one in found.items()} == {
        "": (1, False),
        "a cat runs": (4, False),
        TEXTS[2]: (4, True),
        "a dog": (3, False),
        "Ein Café": (3, False),
    }
    whole = encoded(job_of(encoder_folders["t5"], template="Describe : {}"))
    for text in ("", "a dog"):
        np.testing.assert_allclose(found[text].tensors["embedding"], whole[text].tensors["embedding"][2:], atol=1e-5)


def test_bfloat16_is_stored_as_its_bits(encoder_folders: dict[str, Path]) -> None:
    folder = encoder_folders["t5"]
    half, full = encoded(job_of(folder, dtype="bfloat16")), encoded(job_of(folder))
    values = half["a dog"].tensors["embedding"]
    assert values.dtype == np.uint16
    back = stored_values(values.tobytes(), "bfloat16", values.shape)
    np.testing.assert_allclose(back, full["a dog"].tensors["embedding"], rtol=2**-8)
    assert encoded(job_of(folder, compute_dtype="bfloat16"))["a dog"].tensors["embedding"].dtype == np.float32


def test_the_fingerprint_covers_what_changes_a_value_and_nothing_else(
    encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = encoder_folders["t5"]

    def fingerprint(folder: Path = folder, **options: Any) -> str:
        job = job_of(folder, **options)
        return describe(job, find_files(job)).fingerprint

    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint() == fingerprint(copy, batch_tokens=1, captions="all", device="cpu", unit_rows=7, max_tokens=512)
    others = [
        {"layer": 1},
        {"template": "a {}"},
        {"skip_tokens": 1},
        {"max_tokens": 9},
        {"dtype": "bfloat16"},
        {"compute_dtype": "bfloat16"},
    ]
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"cat"', '"cap"'))
    prints = [
        fingerprint(),
        fingerprint(copy),
        fingerprint(encoder_folders["umt5"]),
        *(fingerprint(**one) for one in others),
    ]
    assert len(set(prints)) == len(prints)


def test_the_hash_of_weights_does_not_depend_on_how_they_are_split(
    encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = transformers.T5EncoderModel.from_pretrained(encoder_folders["t5"])
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert hash_weights(tmp_path) == hash_weights(encoder_folders["t5"])
    # transformers does not load other variants, which repositories have beside it
    shutil.copy(encoder_folders["umt5"] / "model.safetensors", tmp_path / "model.fp16-00001.safetensors")
    (tmp_path / "model.fp16.safetensors.index.json").write_text('{"weight_map": {"x": "model.fp16-00001.safetensors"}}')
    assert hash_weights(tmp_path) == hash_weights(encoder_folders["t5"])
    (tmp_path / "model.fp16-00001.safetensors").unlink()
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ files, such as model-"):
        hash_weights(tmp_path)


def test_what_is_not_an_encoder_is_refused_with_the_reason(encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = encoder_folders["t5"]

    def refused(match: str, where: Path, **options: Any) -> None:
        with pytest.raises((CheckpointError, ConfigError), match=match):
            encoded(job_of(where, **options))

    refused(r"is not a folder", tmp_path / "nowhere")
    refused(r"no config\.json", tmp_path)
    refused(r"a model of type 't5'; --encoder clip reads clip,", folder, encoder="clip")
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(r"has no tokenizer: none of tokenizer\.json, .* give its folder as --tokenizer", bare)
    assert encoded(job_of(bare, tokenizer=str(folder)))
    pickled = shutil.copytree(folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    refused(r"pytorch_model\.bin is pickle, which is not read", pickled)
    cut = shutil.copytree(folder, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is cut off"):
        hash_weights(cut)
    refused(r"cannot be loaded", cut)
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"num_layers": 2', '"num_layers": 3'))
    refused(r"lacks \d+ weights of T5EncoderModel", other)
    refused(r"layer: expected -3 to 2 for this encoder, got 3", folder, layer=3)
    refused(r"the empty caption has no token to store", encoder_folders["gemma"], encoder="gemma")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "no place"}, "template: expected text with one {}"),
        ({"captions": "first,caption"}, "captions: expected first, all, or a list"),
        ({"encoder": "siglip"}, "siglip does not encode texts; give the column of images"),
        ({"encoder": "clip", "from_column": "i2v_cond"}, "from_column: .*'first_frame'"),
        ({"from_column": "first_frame"}, "t5 does not encode images; expected one of clip, siglip"),
        ({"encoder": "clip", "from_column": "first_frame", "template": "a {}"}, "are for texts"),
        ({"device": "cuda:1"}, "cannot be chosen with Ray"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_of(Path("t5"), **{"encoder": "t5", **options})


@pytest.mark.s3
def test_a_checkpoint_in_a_store_is_fetched_by_several_actors_of_a_machine_at_once(
    s3: Any, tmp_path: Path, encoder_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = s3.config()
    store = open_store(f"{s3.root}/t5", storage)
    for path in encoder_folders["t5"].iterdir():
        store.write(path.name, path.read_bytes())
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path / "cache"))
    real, others = Path.symlink_to, list[Path]()

    def while_another_actor_does_the_same(link: Path, target: Path) -> None:
        if not others:
            others.append(Path())
            others[0] = local_folder(store.root, storage)
        real(link, target)

    monkeypatch.setattr(Path, "symlink_to", while_another_actor_does_the_same)
    folder = local_folder(store.root, storage)
    assert others == [folder]
    assert hash_weights(folder) == hash_weights(encoder_folders["t5"])
    assert list(folder.parent.iterdir()) == [folder]
