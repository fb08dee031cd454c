"""Publishing to object stores: two publishers at once on stores that decide races and on those that do not, and commands that read."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.errors import LatheError, PublishFailed
from pipeline.format.layout import DELTA_LOG
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Check, Snapshots
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.publish import Published, PublishOptions, publish
from pipeline.operate.verify import verify_output
from pipeline.storage import Store, open_store
from tests.conftest import S3Server
from tests.pipeline.frameless_build import Careless, visible
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards, publish_all, shown_ids


def race(stores: list[Store], canary: object = None) -> list[Published | LatheError]:
    """What two publishers come to that have both gathered what to publish before either makes it visible."""
    meet, results = threading.Barrier(2), [None, None]

    def run(number: int) -> None:
        def check(_: Store, __: list) -> Check:
            meet.wait(120)
            if canary is not None:
                canary(number)
            return Check("canary", ok=True, message="")

        try:
            results[number] = publish(stores[number], PublishOptions(job={"run": number}), canary=check)
        except LatheError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def check_whole(store: Store, results: list) -> list[Published]:
    """The winners. The record that stays is of one of them, holds all rows, and is what the Delta view shows."""
    won = [item for item in results if isinstance(item, Published)]
    stays = Snapshots(store).latest()
    assert Snapshots(store).numbers() == [1]
    assert stays in [item.snapshot for item in won]
    report = verify_output(store, snapshot=1)
    assert report.ok, report.problems
    assert shown_ids(store, stays) == sorted(row.id for row in visible(store))
    again = publish(store, PublishOptions())
    assert (again.made, again.snapshot, again.delta.version) == (False, stays, 1)
    logged = [json.loads(line) for line in store.read(f"{DELTA_LOG}{1:020}.json").splitlines()]
    (files,) = [table["key"] for name, table in json.loads(stays.to_json())["tables"].items() if name == "files"]
    assert store.exists(files)
    assert len([line for line in logged if "add" in line]) == stays.counts["files"]
    return won


@pytest.mark.s3
def test_on_a_store_that_decides_races_one_publisher_wins(moto: S3Server, tmp_path: Path) -> None:
    stores = [open_store(f"{moto.root}/out", moto.config()) for _ in range(2)]
    Ledger(stores[0]).prepare("films")
    add_shards(stores[0], tmp_path, range(2))
    results = race(stores)
    assert len(check_whole(stores[0], results)) == 1
    (lost,) = [item for item in results if isinstance(item, LatheError)]
    assert isinstance(lost, PublishFailed)
    assert "another publisher was first: snapshot 1 of" in str(lost)


@pytest.mark.s3
def test_on_swift_the_record_that_stays_is_whole(s3: S3Server, tmp_path: Path) -> None:
    """Swift accepts If-None-Match but does not decide races with it: one wins, or both believe so until they look again."""
    stores = [open_store(f"{s3.root}/out", s3.config()) for _ in range(2)]
    Ledger(stores[0]).prepare("films")
    add_shards(stores[0], tmp_path, range(1))
    results = race(stores)
    check_whole(stores[0], results)
    for lost in (item for item in results if isinstance(item, LatheError)):
        assert isinstance(lost, PublishFailed)
        assert "another publisher" in str(lost)


def test_a_publisher_whose_record_was_replaced_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst order on a store that replaces what is there: both have read back their own record."""
    stores = [Careless(str(tmp_path / "out")) for _ in range(2)]
    Ledger(stores[0]).prepare("films")
    add_shards(stores[0], tmp_path, range(2))
    created = [threading.Event(), threading.Event()]
    plain = DeltaLog.sync

    def sync(self: DeltaLog) -> object:
        """Comes after the record was created and read back."""
        number = stores.index(self._store) if self._store in stores else None
        if number is not None:
            created[number].set()
            created[1 - number].wait(120)
        return plain(self)

    monkeypatch.setattr(DeltaLog, "sync", sync)
    results = race(stores, lambda number: created[0].wait(120) if number == 1 else None)
    monkeypatch.undo()
    assert isinstance(results[1], Published)
    assert isinstance(results[0], PublishFailed)
    assert "another publisher replaced the record of snapshot 1" in str(results[0])
    assert check_whole(local_store(tmp_path / "out"), results) == [results[1]]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two snapshots in a local folder."""
    folder = tmp_path_factory.mktemp("s3")
    for number in range(2):
        add_shards(local_store(folder / "out"), folder, range(number, number + 1))
        publish_all(local_store(folder / "out"))
    return folder / "out"


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.s3
def test_commands_say_the_same_of_an_output_in_a_bucket(output: Path, moto: S3Server, tmp_path: Path) -> None:
    for info in local_store(output).list():
        moto.client().put_object(Bucket=moto.bucket, Key=f"a/{info.key}", Body=(output / info.key).read_bytes())
    there, here = f"{moto.root}/a", str(output)
    plot = tmp_path / "plot.png"
    for command in (
        ["snapshots", "{}"],
        ["diff", "{}@1", "{}"],
        ["stats", "{}@1", "--clips", "1", "--plot", str(plot)],
    ):
        found = []
        for root, options in ((here, []), (there, ["--endpoint-url", moto.endpoint])):
            plot.unlink(missing_ok=True)
            words = [word.format(root) for word in command] + options
            found.append((run(*words, "--json").replace(root, "OUTPUT"), plot.exists()))
        assert found[0] == found[1], command
        assert found[0][1] == ("--plot" in command)
    assert json.loads(run("diff", f"{there}@1", here, "--endpoint-url", moto.endpoint, "--json"))["rows"]["added"] == 2
    assert "+2 -0" in run("diff", f"{there}@1", there, "--endpoint-url", moto.endpoint)
    code = CliRunner().invoke(app, ["diff", f"{there}@1", f"{there}@9", "--endpoint-url", moto.endpoint])
    assert (code.exit_code, "has no snapshot 9; there are 1, 2" in code.output) == (2, True)


@pytest.mark.s3
def test_publish_takes_a_bucket_and_writes_its_view_there(moto: S3Server, tmp_path: Path) -> None:
    from deltalake import DeltaTable

    store = open_store(f"{moto.root}/out", moto.config())
    add_shards(store, tmp_path, range(1))
    Ledger(store).prepare("films")
    words = ["publish", store.root, "--canary", "0", "--endpoint-url", moto.endpoint]
    assert "snapshot 1: 2 rows" in run(*words)
    assert "snapshot 1 already covers everything" in run(*words)
    options = {"aws_endpoint_url": moto.endpoint, "aws_allow_http": "true", "aws_region": "us-east-1"}
    keys = {"aws_access_key_id": moto.access_key, "aws_secret_access_key": moto.secret_key}
    table = DeltaTable(f"{store.root}/data", version=1, storage_options=options | keys)
    assert sorted(table.to_pyarrow_table(columns=["id"])["id"].to_pylist()) == shown_ids(
        store, Snapshots(store).read(1)
    )
    table.create_checkpoint()
    text = CliRunner().invoke(app, words).output
    assert ".checkpoint.parquet was not written by Lathe" in text
