"""`lathe embed` and `lathe sidecar …` as a user types them; what publish and gc do about sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from pipeline.cli.app import app
from pipeline.ledger.snapshots import Snapshots
from pipeline.operate.gc import GcOptions, collect
from pipeline.sidecars.names import receipt_key
from pipeline.sidecars.receipts import SidecarReceipts
from tests.loader.outputs import SHORT, Output, clip_of, write_output
from tests.sidecars.sets import copied, write_set


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("output")
    clips = [clip_of(seed, SHORT, caption=caption) for seed, caption in enumerate(["a dog", "a cat runs", None])]
    return write_output(folder / "out", folder / "spool", [clips])


@pytest.fixture
def output(made: Output, tmp_path: Path) -> Output:
    return copied(made, tmp_path)


@pytest.mark.parametrize("command", [["list"], ["verify", "t5"], ["prune", "t5"]])
def test_a_folder_that_is_no_output_is_refused(output: Output, tmp_path: Path, command: list[str]) -> None:
    name, *more = command
    for address, words in (
        (tmp_path / "nothing", "is not a latent set"),
        (f"{output.store.root}@1", "@1 names a snapshot"),
    ):
        assert words in lathe("sidecar", name, address, *more, code=2).stderr


def lathe(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_embed_list_verify_and_what_they_print(output: Output, encoder_folders: dict[str, Path]) -> None:
    options = (
        "--encoder",
        "t5",
        "--checkpoint",
        encoder_folders["t5"],
        "--executor",
        "inline",
        "--device",
        "cpu",
        "--max-tokens",
        3,
    )
    assert lathe("sidecar", "list", output.uri).stdout.startswith("no sidecar sets; `lathe embed`")
    lines = lathe("embed", output.uri, *options).stdout.splitlines()
    assert lines[0].endswith("3 rows of snapshot 1 need 3 distinct texts; 0 were there, 3 were encoded")
    assert lines[1] == "  embedding  bfloat16 […, 32]"
    assert lines[3] == "  without    1 rows have no caption; they get the embedding of the empty one"
    assert lines[4] == "  truncated  1 texts were longer than max_tokens; the rest of them is not embedded"
    again = json.loads(lathe("embed", output.uri, *options, "--json").stdout)
    assert (again["version"], again["encoded"], again["present"]) == (1, 0, 3)
    assert lathe("sidecar", "list", output.uri).stdout.splitlines()[0].startswith("t5@1: 3 rows by caption, 1 files, ")
    (listed,) = json.loads(lathe("sidecar", "list", output.uri, "--json").stdout)
    assert listed["parts"]["max_tokens"] == 3
    assert "all as they were written" in lathe("sidecar", "verify", output.uri, "t5@1").stdout
    data = Path(output.store.uri(SidecarReceipts(output.store, "t5").all()[0].key))
    data.write_bytes(data.read_bytes()[:-1])
    assert f"{data} has sha256" in lathe("sidecar", "verify", output.uri, "t5", code=1).stdout
    data.unlink()
    shown = lathe("sidecar", "verify", output.uri, "t5", code=1).stdout
    assert f"{data} is missing" in shown
    assert "delete their receipts in _sidecars/t5/receipts/, and _sidecars/t5/versions/" in shown
    output.store.delete(receipt_key("t5", SidecarReceipts(output.store, "t5").all()[0].unit))
    shutil.rmtree(output.store.uri("_sidecars/t5/versions"))
    again = json.loads(lathe("embed", output.uri, *options, "--json").stdout)
    assert (again["version"], again["encoded"], again["present"]) == (1, 3, 0)
    assert "t5@1: 3 rows in 1 files" in lathe("sidecar", "verify", output.uri, "t5").stdout


def test_a_takedown_names_the_sets_that_keep_tensors(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [[""]], folder=tmp_path / "set")
    shown = lathe("takedown", output.uri, sorted(output.clips)[0], "--reason", "asked for").stdout
    assert "  sidecars  t5: tensors of these rows stay until `lathe sidecar prune`" in shown


def test_import_says_what_it_did(output: Output, tmp_path: Path) -> None:
    rows = [{"id": name, "embedding": [[1.0, 2.0]]} for name in [*sorted(output.clips)[:2], "nothing"]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    command = ("sidecar", "import", output.uri, tmp_path / "table.parquet", "--name", "mine")
    assert "1 of 3 ids" in lathe(*command, code=2).stderr
    lines = lathe(*command, "--skip-unknown", "--about", "by hand").stdout.splitlines()
    assert lines[0] == "sidecar set mine, version 1: 2 rows imported by id, 0 were there"
    assert lines[2:] == [
        "  left out   1 rows of the table that no row of snapshot 1 needs",
        "  lacking    1 of 3 rows of snapshot 1 have no tensors yet",
    ]
    assert "--by: expected id, caption or caption_hash" in lathe(*command, "--by", "name", code=2).stderr


def test_wrong_options_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    command = ("embed", tmp_path / "nowhere", "--encoder", "t5", "--checkpoint", "t5")
    assert "layer" in lathe(*command, "--layer", "first", code=2).output
    assert "encoder: t5 does not encode images" in lathe(*command, "--from", "first_frame", code=2).stderr
    assert "dtype" in lathe(*command, "--dtype", "int8", code=2).stderr


def test_a_snapshot_records_the_versions_of_sets_and_gc_leaves_them_alone(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [["a dog"], ["a cat runs"]], folder=tmp_path / "set")
    kept = set(output.store.keys("_sidecars/"))
    write_output(output.uri, tmp_path / "spool", [[clip_of(300, SHORT)]], first=1)
    newest = Snapshots(output.store).get(None)
    assert (newest.number, newest.lineage["sidecars"]) == (2, {"t5": 1})
    assert "sidecars: t5@1" in lathe("snapshots", output.uri).stdout
    found = collect(output.store, GcOptions(grace_s=0))
    assert set(output.store.keys("_sidecars/")) == kept
    assert found["foreign"]["objects"] == 0
    assert output.store.exists(receipt_key("t5", SidecarReceipts(output.store, "t5").all()[0].unit))
