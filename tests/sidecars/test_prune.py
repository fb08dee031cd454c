"""`lathe sidecar prune`: tensors of what was taken down go, all others stay as they were, through kills."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import StorageConfig
from pipeline.embedding import pruning
from pipeline.embedding.pruning import prune
from pipeline.embedding.upkeep import verify_set
from pipeline.errors import InputError
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import LatentDataset, LatentLoader
from pipeline.sidecars.names import key_of
from pipeline.sidecars.reading import SidecarReader
from pipeline.sidecars.receipts import SidecarReceipts
from pipeline.sidecars.versions import Coverage, SetVersions
from pipeline.storage import Store
from tests.loader.outputs import SHORT, Output, clip_of, write_output
from tests.sidecars.sets import BYTES, bits_of, copied, values_of, write_set, write_unit

CAPTIONS = ["a dog", "a cat", "shared", "shared", "a secret", None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("output")
    clips = [
        clip_of(seed, SHORT, caption=caption, uri=f"s3://corpus/{seed}.tar", metadata={"long": f"long {seed}"})
        for seed, caption in enumerate(CAPTIONS)
    ]
    made = write_output(folder / "out", folder / "spool", [clips])
    write_set(made.store, [["", "a dog", "a secret"], ["a cat", "shared", "a dog"]], folder=folder / "set")
    return made


@pytest.fixture
def output(made: Output, tmp_path: Path) -> Output:
    return copied(made, tmp_path)


def pruned(store: Store, name: str = "t5", **options: float) -> dict[str, int]:
    return {**prune(store, name, StorageConfig(), **options).to_dict()}  # type: ignore[arg-type]


def aged(store: Store) -> None:
    for path in Path(store.root, "_sidecars").rglob("*"):
        os.utime(path, (1, 1))


def check(store: Store, texts: set[str], name: str = "t5") -> None:
    reader = SidecarReader(store, name)
    assert len(reader) == len(texts)
    for text in texts:
        found = reader.tensors(text)
        assert found is not None
        for tensor, kind in reader.described.tensors.items():
            wanted = values_of(text, tokens=None if name == "t5" else 2)[tensor]
            assert np.array_equal(found[tensor], bits_of(wanted, kind.dtype))
    assert verify_set(store, name)["num_damaged"] == 0


KEPT = {"", "a dog", "a cat", "shared"}


def test_what_was_taken_down_goes_and_everything_else_stays(output: Output) -> None:
    store = output.store
    assert pruned(store)["pruned"] == 0
    assert SetVersions(store, "t5").numbers() == [1]
    record_takedown(store, "asked for", sources=["s3://corpus/4.tar", "s3://corpus/2.tar"])
    before = set(store.keys("_sidecars/"))
    assert (pruned(store, dry_run=True)["pruned"], set(store.keys("_sidecars/"))) == (1, before)
    report = pruned(store)
    assert (report["version"], report["rows"], report["pruned"], report["rewritten"], report["waiting"]) == (
        2,
        4,
        1,
        1,
        1,
    )
    check(store, KEPT)
    assert SidecarReader(store, "t5@1").tensors("a secret") is not None, "for readers of the old version"
    assert key_of("a secret").rstrip(b"\0") not in SetVersions(store, "t5").keys_done().tolist()
    aged(store)
    report = pruned(store)
    assert (report["pruned"], report["deleted"], report["versions_deleted"], report["waiting"]) == (0, 1, 1, 0)
    with pytest.raises(InputError, match=r"t5 of .* has no version 1; there are 2"):
        SidecarReader(store, "t5@1")
    check(store, KEPT)
    secret = bits_of(values_of("a secret")["embedding"], "bfloat16").tobytes()
    files = [path for path in Path(store.root, "_sidecars").rglob("*") if path.is_file()]
    assert files
    assert not [
        path for path in files if secret in path.read_bytes() or key_of("a secret").hex().encode() in path.read_bytes()
    ]
    with LatentLoader(LatentDataset.open(output.uri), batch=1, epochs=1, sidecars="t5") as loader:
        assert len(list(loader)) == 6


def test_rows_by_id_go_with_their_rows(output: Output, tmp_path: Path) -> None:
    ids = sorted(output.clips)
    write_set(output.store, [ids[:1], ids[1:]], BYTES, folder=tmp_path / "set")
    record_takedown(output.store, "asked for", ids=ids[:2])
    report = pruned(output.store, "pixels")
    assert (report["pruned"], report["rewritten"], report["rows"]) == (2, 2, 4)
    check(output.store, set(ids[2:]), "pixels")


def test_captions_that_were_embedded_stay_needed_after_their_versions_are_gone(output: Output, tmp_path: Path) -> None:
    """What a version covers is gone with it; without the sources a later run took other captions for unneeded."""
    SetVersions(output.store, "t5").publish(Coverage(1, ("caption", "metadata.long"), "f"))
    write_unit(output.store, ["long 0"], folder=tmp_path)
    for name in ("4", "2"):
        record_takedown(output.store, "asked for", sources=[f"s3://corpus/{name}.tar"])
        pruned(output.store)
        aged(output.store)
    assert pruned(output.store)["pruned"] == 0
    check(output.store, {*KEPT, "long 0"})


def test_a_row_that_another_file_hides_goes_with_it(output: Output, tmp_path: Path) -> None:
    """Two runs encoded a caption: where only the file that counts was written again, the other one's row counted."""
    write_set(output.store, [["a secret", "shared"]], folder=tmp_path)
    record_takedown(output.store, "asked for", sources=["s3://corpus/4.tar"])
    assert pruned(output.store)["pruned"] == 1
    check(output.store, KEPT)
    assert SidecarReader(output.store, "t5").tensors("a secret") is None


class Killed(BaseException):
    """Ends a run where a kill would."""


@pytest.mark.parametrize("step", ["_delete_receipts", "publish_without", "_delete_old"])
def test_a_run_that_ends_anywhere_is_finished_by_the_next(
    output: Output, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    record_takedown(output.store, "asked for", sources=["s3://corpus/4.tar"])

    def die(*arguments: object, **options: object) -> None:
        raise Killed(step)

    with monkeypatch.context() as patched:
        patched.setattr(SetVersions if step == "publish_without" else pruning, step, die)
        with pytest.raises(Killed):
            pruned(output.store)
    assert pruned(output.store)["rows"] == len(KEPT)
    check(output.store, KEPT)
    assert SetVersions(output.store, "t5").read().files == 2
    aged(output.store)
    pruned(output.store)
    check(output.store, KEPT)
    assert len([key for key in output.store.keys("_sidecars/t5/data/") if key.endswith(".sidecar")]) == 2


def test_what_another_run_adds_meanwhile_stays(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_takedown(output.store, "asked for", sources=["s3://corpus/4.tar"])
    real = pruning._delete_receipts

    def slow(*arguments: object) -> None:
        write_unit(output.store, ["new"], folder=tmp_path)
        SetVersions(output.store, "t5").publish()
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pruning, "_delete_receipts", slow)
    assert pruned(output.store)["version"] == 3
    check(output.store, {*KEPT, "new"})
    assert sum(one.rows for one in SidecarReceipts(output.store, "t5").all()) == 6
