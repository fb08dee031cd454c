"""docs/formats.md against real outputs: what it lists is there, and what is there it lists."""

import json
import re
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import pipeline
from tests.tiny_corpus import receipts, tiny_job, video_bytes, write_tar

DOCUMENT = Path(__file__).parents[2].joinpath("docs", "formats.md").read_text()
NAMES = re.compile(r"`([a-z_0-9]+)`")
CONTAINERS = [("parquet", False), ("parquet", True), ("tar", False), ("tar", True)]
OPTIONAL = (
    "vae_logvar",
    "i2v_cond",
    "first_frame",
)  # what begins the names of columns of builds with moments and `write.store`


def table_after(heading: str) -> dict[str, list[str]]:
    """Names in the first column of the first table after `heading`, each with the names in its second column."""
    assert heading in DOCUMENT
    lines = DOCUMENT.split(heading, 1)[1].splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("|---"))
    found = {}
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        cells = line.split("|")
        for name in NAMES.findall(cells[1]):
            found[name] = NAMES.findall(cells[2])
    return found


@pytest.fixture(scope="module", params=CONTAINERS, ids=lambda param: f"{param[0]}{'-moments' * param[1]}")
def output(request, tmp_path_factory):
    """A build with a written clip and a reject; container, whether it stores moments and all else, its data file, its receipt."""
    container, moments = request.param
    folder = tmp_path_factory.mktemp("documented")
    corpus = write_tar(folder / "a.tar", {"a": {"mp4": video_bytes(9)}, "b": {"mp4": video_bytes(3)}})
    flags = {"write.format": container, "write.moments": moments}
    flags |= {"write.store": "first_frame,i2v_cond", "write.compression": "zstd"} if moments else {}
    pipeline.encode(tiny_job(corpus, folder / "out", **flags))
    (receipt,) = receipts(folder / "out")
    return container, moments, folder / "out" / receipt.files[0].key, receipt


def file_metadata(container, path):
    if container == "parquet":
        return json.loads(pq.read_schema(path).metadata[b"latentset"])
    with tarfile.open(path) as tar:
        return json.loads(tar.extractfile("__latentset__").read())


def test_file_metadata_has_the_documented_fields_and_no_others(output):
    container, moments, path, receipt = output
    documented = table_after("File key-value metadata")
    found = file_metadata(container, path)
    assert found.keys() == documented.keys()
    for name in ("latent", "normalisation", "versions"):
        optional = {"without"} if moments else {"store", "compression", "without"}  # without: see test_unpaired_rows
        assert found[name].keys() == set(documented[name]) - optional, name
    for name in ("spec", "encoder"):  # and facts of one network or another
        assert found[name].keys() >= set(documented[name]), name
    assert found["latent"]["posterior"] == ("moments" if moments else "mean")
    assert (found["container"], found["bucket"]) == (container, receipt.files[0].bucket)
    assert found["fingerprint"] == receipt.fingerprint
    assert found["fingerprint_parts"] == receipt.fingerprint_parts
    assert all(re.match(r"\d", value) for value in found["versions"].values()), found["versions"]


def test_every_fact_of_a_file_is_written_once(output):
    container, _, path, _ = output
    found = file_metadata(container, path)
    names = [*found, *found["latent"]]
    assert len(names) == len(set(names))


def test_columns_are_the_documented_ones_and_no_others(output):
    container, moments, path, _ = output
    documented = table_after("### Columns").keys()
    if not moments:
        documented = {name for name in documented if not name.startswith(OPTIONAL)}
    if container == "parquet":
        assert set(pq.read_schema(path).names) == documented
        return
    with tarfile.open(path) as tar:
        member = next(name for name in tar.getnames() if name.endswith(".json"))
        found = json.loads(tar.extractfile(member).read())
    tensors = {name for name in documented if name == "vae_latent_bytes" or name.startswith(OPTIONAL)}
    assert found.keys() == documented - tensors


def test_receipts_have_the_documented_fields_and_no_others(output):
    *_, path, receipt = output
    documented = table_after("## Receipt")
    stored = Path(str(path).split("/data/")[0]) / "_receipts" / f"{receipt.shard_id}.json"
    found = json.loads(stored.read_bytes())
    assert found.keys() == documented.keys()
    assert found["files"][0].keys() == set(documented["files"])
    assert found["rejects"][0].keys() == set(documented["rejects"])


def test_side_indexes_have_the_documented_columns_and_no_others(output):
    _, moments, path, receipt = output
    table = pq.read_schema(Path(str(path).split("/data/")[0]) / receipt.files[0].index_key)
    text = DOCUMENT.split("## Side index", 1)[1].split("Its key-value metadata", 1)[0]
    documented = {name for name in NAMES.findall(text) if moments or not name.startswith(OPTIONAL)}
    assert set(table.names) == documented
