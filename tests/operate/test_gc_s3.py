"""`lathe gc` and `lathe takedown` on S3: unfinished multipart uploads, deletion, one round of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.ledger.receipts import Ledger
from pipeline.operate.gc import GcOptions, collect
from pipeline.operate.takedown import take_down
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from tests.conftest import S3Server
from tests.operate.outputs import files_of, snapshot_numbers, stored, tar, write_files, write_version
from tests.pipeline.latent_clips import latent_clip
from tests.pipeline.published import publish_all

pytestmark = pytest.mark.s3
UPLOADS = ("data/f0e1d2c3/v17x64x48/0123456789abcdef-a1-00000.parquet", "data/theirs.parquet", "../elsewhere.bin")


@pytest.fixture(params=["s3", "moto"])
def server(request: pytest.FixtureRequest) -> S3Server:
    """Swift, and moto."""
    return request.getfixturevalue(request.param)


def open_uploads(server: S3Server) -> set[str]:
    found = server.client().list_multipart_uploads(Bucket=server.bucket)
    return {item["Key"] for item in found.get("Uploads", ())}


def test_gc_aborts_unfinished_uploads_and_deletes_what_nothing_needs(
    server: S3Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = open_store(f"{server.root}/out", server.config())
    Ledger(store).prepare("films")
    taken = write_version(store, tmp_path, "a", "e1", (0, 1))
    write_version(store, tmp_path, "b", "e1", (10,))
    publish_all(store)
    orphan = files_of(write_files(store, tmp_path, tar("x", "e1"), [latent_clip(50)]))
    client, keys = server.client(), [f"out/{UPLOADS[0]}", f"out/{UPLOADS[1]}", "elsewhere.bin"]
    for key in keys:
        client.create_multipart_upload(Bucket=server.bucket, Key=key)
    assert open_uploads(server) == set(keys)
    if request.node.callspec.params["server"] == "s3":  # in moto all uploads began in 2010
        assert collect(store)["deleted"]["leftovers"]["files"] == 0, "younger than the grace time"
    take_down(store, [taken.shard.objects[0].uri], reason="asked", by="ann")
    publish_all(store)
    found = collect(store, GcOptions(grace_s=0, keep_snapshots=1, keep_days=0))
    assert found["deleted"]["leftovers"]["files"] == 1
    assert open_uploads(server) == set(keys[1:]), "Lathe did not begin the others"
    assert snapshot_numbers(store) == [2]
    assert not (files_of(taken) | orphan) & stored(store)
    assert len(found["takedowns"]["names_removed"]) == 1
    report = verify_output(store)
    assert (report.problems, report.orphans) == ([], 0)
    assert len(list(store.leftovers("data/"))) == 1


def test_hidden_files_of_a_folder_are_leftovers_too(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.write("data/a", b"whole")
    (tmp_path / "data/.lathe-tmp-1").write_bytes(b"half")
    (tmp_path / ".lathe-tmp-2").write_bytes(b"")
    assert [item.key for item in store.leftovers("data/")] == ["data/.lathe-tmp-1"]
    assert [item.key for item in store.leftovers("", recursive=False)] == [".lathe-tmp-2"]
    for item in (*store.leftovers("data/"), *store.leftovers("", recursive=False)):
        store.discard(item)
        store.discard(item)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["data/a"]
