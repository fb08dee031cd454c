"""What a build writes for those who get the output: a data card, and an output whose root other engines read as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.engine.driver.encode import encode
from pipeline.format.card import hugging_face_config
from pipeline.operate.verify import verify_output
from pipeline.storage.local import LocalStore
from tests.tiny_corpus import make_corpus, receipts, rows, tiny_job

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("in"), shards=1)


@pytest.fixture(scope="module")
def two_fingerprints(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fingerprint in float16, in Parquet and then, of a second corpus, in tar; one with other columns."""
    output = tmp_path_factory.mktemp("two") / "out"
    encode(tiny_job(corpus, output, **{"write.dtype": "float16"}))
    encode(tiny_job(corpus, output, **{"write.moments": True}))
    return output


def folders(output: Path) -> dict[str, str]:
    """First digits of the fingerprint, by storage dtype."""
    return {item.fingerprint_parts["storage_dtype"]: item.fingerprint[:8] for item in receipts(output)}


@pytest.mark.parametrize("container", ["parquet", "tar"])
def test_hugging_face_takes_the_root_for_the_data_and_nothing_else(
    tmp_path: Path, corpus: Path, container: str
) -> None:
    import datasets

    output = tmp_path / "out"
    encode(tiny_job(corpus, output, **{"write.format": container}))
    assert verify_output(LocalStore(str(output))).problems == []
    loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"), split="train")
    key = "id" if container == "parquet" else "__key__"
    found = {row[key]: row for row in loaded}
    (receipt,) = receipts(output)
    assert len(found) == receipt.counts.clips > 0
    if container == "parquet":
        assert {name: row["vae_latent_bytes"] for name, row in found.items()} == {
            name: row["vae_latent_bytes"] for name, row in rows(output).items()
        }
    card = (output / "_README.md").read_text()
    (entry,) = yaml.safe_load((output / ".huggingface.yaml").read_text())["configs"]
    assert yaml.safe_load(card.split("---")[1])["configs"] == [
        {name: value for name, value in entry.items() if name != "description"}
    ]
    for words in ("leanvae", receipt.fingerprint, "`float32`", "never normalised"):
        assert words in card


def test_engines_that_scan_a_folder_take_the_root_for_the_data(tmp_path: Path, corpus: Path) -> None:
    import duckdb
    import polars
    import pyarrow.dataset

    output = tmp_path / "out"
    encode(tiny_job(corpus, output))
    expected = {name: row["vae_latent_bytes"] for name, row in rows(output).items()}
    table = pyarrow.dataset.dataset(output).to_table()
    assert dict(zip(table["id"].to_pylist(), table["vae_latent_bytes"].to_pylist(), strict=True)) == expected
    frame = polars.scan_parquet(f"{output}/**/*.parquet").collect()
    assert dict(zip(frame["id"], frame["vae_latent_bytes"], strict=True)) == expected
    with duckdb.connect() as connection:
        found = connection.execute(f"select id, vae_latent_bytes from '{output}/**/*.parquet'").fetchall()
    assert dict(found) == expected


def test_an_edited_card_stays_as_it_is(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "out"
    encode(tiny_job(corpus, output))
    (output / "_README.md").write_text("mine")
    (output / ".huggingface.yaml").write_text("configs: []\n")
    encode(tiny_job(corpus, output, **{"write.dtype": "float16"}))
    assert (output / "_README.md").read_text() == "mine"
    assert (output / ".huggingface.yaml").read_text() == "configs: []\n"


def test_each_fingerprint_has_a_configuration(two_fingerprints: Path) -> None:
    import datasets

    names = datasets.get_dataset_config_names(str(two_fingerprints))
    assert sorted(names) == sorted(f"parquet-{fp8}" for fp8 in folders(two_fingerprints).values())
    config = (two_fingerprints / ".huggingface.yaml").read_text()
    again = hugging_face_config(config, folders(two_fingerprints)["float16"] + "0" * 24, "parquet", "now")
    assert again is not None
    assert [line for line in again.splitlines() if "description" not in line] == [
        line for line in config.splitlines() if "description" not in line
    ]
    assert again.count("description: now") == 1


def test_hugging_face_reads_rows_that_were_added_after_it_had_read_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    corpus = make_corpus(tmp_path / "in", shards=2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shards = sorted(corpus.glob("*.tar"))
    found = []
    for output, inputs in (
        ("a/out", shards[:1]),
        ("a/out", shards[:2]),
        ("b/out", shards[1:2]),
    ):  # the cache knows only "out"
        encode(tiny_job([str(path) for path in inputs], tmp_path / output))
        found.append(
            (set(datasets.load_dataset(str(tmp_path / output), split="train")["id"]), set(rows(tmp_path / output)))
        )
    assert all(loaded == stored for loaded, stored in found)
    assert len(found[0][0]) < len(found[1][0])


def recipes() -> dict[str, str]:
    """Python blocks of docs/formats.md, by their first comment."""
    blocks = [part.partition("```")[0] for part in DOCUMENT.read_text().split("```python\n")[1:]]
    return {block.partition("\n")[0].strip("# "): block for block in blocks if block.startswith("#")}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", recipes())
def test_recipes_of_the_document_read_an_output_of_two_fingerprints(
    two_fingerprints: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache")
    )  # the variable counts at the first import only
    output = two_fingerprints
    if name.startswith("webdataset"):
        output = tmp_path / "out"
        for dtype in ("float16", "float32"):
            encode(tiny_job(corpus, output, **{"write.format": "tar", "write.dtype": dtype}))
    (one,) = [item for item in receipts(output) if item.fingerprint[:8] == folders(output)["float16"]]
    scope = {"out": str(output), "fp8": one.fingerprint[:8], "bucket": one.files[0].bucket}
    exec(recipes()[name].replace('"dog"', '"clip"'), scope)  # the captions of the tiny corpus have no dog
    if "latent" in scope:
        assert scope["latent"].shape == (4, 2, 4, 4)
        assert scope["latent"].dtype == "float16"
    elif name == "Hugging Face":
        assert len(scope["first"]) == 4 * 2 * 4 * 4 * 2
    elif name.startswith("DuckDB"):
        assert [row[1] for row in scope["rows"]] == [one.counts.clips]
    else:
        assert len(scope["rows"]) == one.counts.clips
