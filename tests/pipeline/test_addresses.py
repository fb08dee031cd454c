"""`OUTPUT@N`: what commands make of names that hold `@`, for every command that takes an output."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import StorageConfig
from pipeline.errors import ConfigError, InputError
from pipeline.ledger.addresses import check_whole_output, open_output
from pipeline.ledger.snapshots import split_number
from pipeline.loader.dataset import LatentDataset
from pipeline.storage import open_store
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards, publish_all

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TAKE_AN_OUTPUT = sorted(
    name
    for name, command in COMMANDS.items()
    if any("OUTPUT" in (item.metavar or "") for item in command.params if item.param_type_name == "argument")
)
WRITE = {"compact", "encode", "gc", "publish", "takedown"}
READ = sorted(set(TAKE_AN_OUTPUT) - WRITE)
NEEDED = {
    "embed": ["--encoder", "t5", "--checkpoint", "nowhere", "--executor", "inline"],
    "export": ["--to", "wds"],
    "takedown": ["s3://corpus/a.tar"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out` (two snapshots) and `other@1` (one)."""
    folder = tmp_path_factory.mktemp("addresses")
    store = local_store(folder / "out")
    for number in range(2):
        add_shards(store, folder, range(number, number + 1))
        publish_all(store, delta=False)
    add_shards(local_store(folder / "other@1"), folder, range(1))
    publish_all(local_store(folder / "other@1"), delta=False)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def run(name: str, address: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of a command whose output argument is `address`, each other required argument a folder."""
    words = [name]
    for item in COMMANDS[name].params:
        if item.param_type_name != "argument":
            continue
        if item.metavar == "INPUT... OUTPUT":
            words += [str(folder / "corpus"), address]
        elif "OUTPUT" in (item.metavar or ""):
            words.append(address)
        elif item.required:
            words.append(str(folder / "new"))
    result = CliRunner().invoke(app, [*words, *NEEDED.get(name, [])])
    return result.exit_code, result.output


def test_the_commands_that_take_an_output_are_found() -> None:
    assert {"diff", "encode", "inspect", "preview", "publish", "snapshots", "stats", "status", "verify"} <= set(
        TAKE_AN_OUTPUT
    )


@pytest.mark.parametrize("name", READ)
def test_a_command_that_reads_refuses_a_name_of_a_folder_and_a_snapshot(name: str, folder: Path) -> None:
    (folder / "other@1").rename(folder / "out@1")
    code, text = run(name, str(folder / "out@1"), folder)
    assert code == 2
    assert f"{folder}/out@1 is a folder, and {folder}/out is an output" in text
    assert f"write {folder}/out@1/ for the folder, {folder}/out/@1 for the snapshot" in text


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("word", ["latest", "", "-1", "1.5"])
def test_a_command_that_reads_wants_a_number(name: str, word: str, made: Path) -> None:
    code, text = run(name, f"{made}/out@{word}", made)
    assert code == 2
    assert f"expected the number of a snapshot after @, got {word!r}; without @N the newest is taken" in text


def test_the_history_of_an_input_is_over_all_snapshots(made: Path) -> None:
    code, text = run("why", f"{made}/out@1", made)
    assert code == 2
    assert "the history of an input is over all snapshots" in text


@pytest.mark.parametrize("name", sorted(set(READ) - {"serve", "why"}))
def test_a_command_that_reads_names_the_snapshots_there_are(name: str, made: Path) -> None:
    code, text = run(name, f"{made}/out@7", made)
    assert code == 2
    assert "has no snapshot 7; there are 1, 2" in text


@pytest.mark.parametrize("name", sorted(WRITE))
def test_a_command_that_writes_refuses_a_number(name: str, folder: Path) -> None:
    (folder / "corpus").mkdir()
    before = sorted(folder.rglob("*"))
    for address in ("out@1", "other@1", "new@3"):
        code, text = run(name, str(folder / address), folder)
        root = address[:-2]
        assert code == 2, text
        assert (
            f"{address}: this command writes to a whole output, and @{address[-1]} names a snapshot of {folder}/{root}"
            in text
        )
        assert f"write {folder}/{root} for the output, or {folder}/{address}/ for a folder of that name" in text
    assert sorted(folder.rglob("*")) == before


def test_publish_takes_a_name_that_ends_in_a_slash(folder: Path) -> None:
    add_shards(local_store(folder / "other@1"), folder, range(3, 4))
    text = CliRunner().invoke(app, ["publish", f"{folder}/other@1/", "--canary", "0", "--no-delta"]).output
    assert "snapshot 2: 4 rows" in text


def test_snapshots_of_a_number_shows_that_one(made: Path) -> None:
    lines = CliRunner().invoke(app, ["snapshots", f"{made}/out@1"]).output.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("     ") and line.strip()[0].isdigit()] == ["1"]
    assert len(CliRunner().invoke(app, ["snapshots", f"{made}/out"]).output.splitlines()) == len(lines) + 2


def opened(address: object) -> tuple[str, int | None]:
    store, number = open_output(str(address), StorageConfig())
    return store.root, number


def test_an_address_is_a_folder_if_only_that_exists(folder: Path) -> None:
    assert opened(folder / "out@2") == (str(folder / "out"), 2)
    assert opened(f"{folder}/out/@2") == (str(folder / "out"), 2)
    assert opened(folder / "other@1") == (str(folder / "other@1"), None)
    assert opened(folder / "other@1@1") == (str(folder / "other@1"), 1)
    assert opened(folder / "nothing@3") == (str(folder / "nothing"), 3)
    assert opened(folder / "user@host") == (str(folder / "user@host"), None)
    (folder / "out@2").mkdir()
    assert opened(folder / "out@2") == (str(folder / "out"), 2), "an empty folder is not an output"
    (folder / "out@2" / "videos").mkdir()
    (folder / "out@2" / "videos" / "a.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match="out@2 is a folder, and"):
        opened(folder / "out@2")
    assert opened(f"{folder}/out@2/") == (str(folder / "out@2"), None)
    assert opened(f"{folder}/out/@2") == (str(folder / "out"), 2)


def test_the_loader_follows_the_same_rule(folder: Path) -> None:
    assert len(LatentDataset.open(f"{folder}/out@1")) == 2
    assert len(LatentDataset.open(f"{folder}/other@1")) == 2
    (folder / "other@1").rename(folder / "out@1")
    with pytest.raises(InputError, match="out@1 is a folder, and"):
        LatentDataset.open(f"{folder}/out@1")


def test_numbers_follow_the_last_at_sign() -> None:
    assert split_number("s3://bucket/a@b/out@12") == ("s3://bucket/a@b/out", 12)
    for plain in ("out", "user@host", "out@1/", "out@", "out@١", f"out@{'9' * 5000}"):
        assert split_number(plain) == (plain, None)
        assert check_whole_output(plain) == plain
    with pytest.raises(ConfigError, match="s3://bucket/out@3: this command writes to a whole output"):
        check_whole_output("s3://bucket/out@3")


@pytest.mark.parametrize(
    "address", ["s3://AKIA:secret@bucket/out", "s3://AKIA:secret@bucket/out@1", "s3://user@bucket@1"]
)
def test_keys_of_an_account_in_an_address_are_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(
        InputError, match="no bucket has '@' or ':' in its name; keys of an account belong into"
    ) as caught:
        open_output(address, StorageConfig())
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="no bucket has '@' or ':' in its name"):
        open_store("s3://tenant:bucket/out", StorageConfig())


@pytest.mark.s3
def test_the_rule_holds_in_a_bucket(s3) -> None:
    config = s3.config()

    def opened(address: str) -> tuple[str, int | None]:
        store, number = open_output(address, config)
        return store.root, number

    root = f"{s3.root}/a@b/out"
    assert opened(s3.root) == (s3.root, None)
    assert opened(f"{s3.root}@1") == (s3.root, 1), "an output may be a whole bucket"
    assert opened(f"{root}@1") == (root, 1)
    open_store(root, config).write("_latentset.json", b"{}")
    assert opened(f"{root}@1") == (root, 1)
    open_store(f"{root}@1", config).write("x", b"")
    with pytest.raises(InputError, match="out@1 is a folder, and"):
        opened(f"{root}@1")
    assert opened(f"{root}@1/")[1] is None
    with pytest.raises(InputError, match="expected the number of a snapshot after @, got 'latest'"):
        opened(f"{root}@latest")
