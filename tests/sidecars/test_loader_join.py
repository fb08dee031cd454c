"""Sidecar sets in the loader: tensors of the caption each row trains with, and what follows where a row has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError, InputError, OutputError, StorageUnavailable
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import Batch, LatentDataset, LatentLoader, Pack
from pipeline.sidecars.description import SidecarSet, TensorKind, create_set
from pipeline.sidecars.names import BY_CAPTION, data_prefix, key_of, unit_of
from pipeline.sidecars.reading import SidecarReader
from pipeline.sidecars.storing import store_unit
from pipeline.sidecars.versions import Coverage, SetVersions
from pipeline.storage import patience
from pipeline.storage.local import LocalStore
from tests.loader.outputs import SHORT, WIDE, Output, clip_of, write_output
from tests.sidecars.sets import BYTES, TEXT, WIDTH, copied, receipts, values_of, write_set

COUNT = 12


def caption(seed: int) -> str | None:
    return None if seed % 6 == 5 else f"caption {seed % 5}" + " word" * (seed % 3)


def films(folder: Path) -> Output:
    """12 clips in two shards; some share a caption, two have none."""
    clips = [
        clip_of(seed, WIDE if seed % 2 else SHORT, caption=caption(seed), metadata={"long": [f"long {seed}", "long"]})
        for seed in range(COUNT)
    ]
    return write_output(folder / "out", folder / "spool", [clips[:7], clips[7:]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("output")
    return films(folder)


@pytest.fixture
def output(made: Output, tmp_path: Path) -> Output:
    return copied(made, tmp_path)


def texts_of(output: Output) -> list[str]:
    return sorted({clip.sample.caption or "" for clip in output.clips.values()} | {""})


def batches(output: Output, **options: Any) -> list[Batch]:
    with LatentLoader(LatentDataset.open(output.uri), batch=1, epochs=1, sidecars=("t5",), **options) as loader:
        return list(loader)


def check(batch: Batch) -> None:
    """Each row has the tensors of its caption."""
    for i, text in enumerate(batch.captions):
        wanted = values_of(text)
        embedding = batch.sidecars["t5"]["embedding"][i]
        assert embedding.dtype == torch.bfloat16
        assert np.array_equal(embedding.to(torch.float32).numpy(), wanted["embedding"]), text
        assert np.array_equal(batch.sidecars["t5"]["pooled"][i].numpy(), wanted["pooled"])


def test_each_row_has_the_tensors_of_its_caption(output: Output, tmp_path: Path) -> None:
    texts = texts_of(output)
    write_set(output.store, [texts[:3], texts[3:]], folder=tmp_path / "set")
    found = batches(output, verify="always")
    assert sorted(name for batch in found for name in batch.ids) == sorted(output.clips)
    for batch in found:
        check(batch)
    assert {text for batch in found for text in batch.captions} == set(texts)
    with LatentLoader(
        LatentDataset.open(output.uri), batch=Pack(64, sequences=2), sidecars="t5@1", drop_last=False, epochs=1
    ) as loader:
        packed = list(loader)
    assert max(len(batch) for batch in packed) > 1
    for batch in packed:
        check(batch)


def test_drawn_and_dropped_captions_have_their_own_tensors(output: Output, tmp_path: Path) -> None:
    long = [f"long {seed}" for seed in range(COUNT)]
    write_set(output.store, [[*texts_of(output), *long, "long"]], folder=tmp_path / "set")
    found = batches(output, captions=("caption", "metadata.long"), caption_dropout=0.4)
    for batch in found:
        check(batch)
    kinds = {text.split(" ")[0] for batch in found for text in batch.captions}
    assert kinds == {"", "caption", "long"}


def test_rows_without_tensors_are_refused_when_the_loader_is_made(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [[text for text in texts_of(output) if "caption 1" not in text]], folder=tmp_path / "set")
    lacking = [clip.sample.caption for clip in output.clips.values() if "caption 1" in (clip.sample.caption or "")]
    with pytest.raises(
        InputError, match=rf"{len(lacking)} of 12 rows of .* have no tensors in t5@1, such as .*`lathe embed`"
    ):
        batches(output)
    with pytest.raises(InputError, match="no sidecar set 'clip'; there are t5"):
        LatentLoader(LatentDataset.open(output.uri), batch=1, sidecars=("clip",))
    with pytest.raises(InputError, match=r"t5 of .* has no version 2; there are 1"):
        LatentLoader(LatentDataset.open(output.uri), batch=1, sidecars=("t5@2",))
    with pytest.raises(ConfigError, match="missing_sidecars: expected error, drop, zero"):
        batches(output, missing_sidecars="ignore")
    with pytest.raises(ConfigError, match="expected each set once"):
        LatentLoader(LatentDataset.open(output.uri), batch=1, sidecars=("t5", "t5@1"))


def test_zeros_stand_for_missing_tensors_and_are_counted(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [["caption 0"]], folder=tmp_path / "set")
    with LatentLoader(
        LatentDataset.open(output.uri), batch=1, epochs=1, sidecars="t5", missing_sidecars="zero"
    ) as loader:
        found = list(loader)
        assert loader.stats()["sidecars_missing"] == sum(batch.captions != ["caption 0"] for batch in found) > 0
    for batch in found:
        (embedding,), (pooled,) = batch.sidecars["t5"]["embedding"], batch.sidecars["t5"]["pooled"]
        if batch.captions == ["caption 0"]:
            check(batch)
        else:
            assert embedding.shape == (1, WIDTH)
            assert pooled.shape == (WIDTH,)
            assert not embedding.any()
            assert not pooled.any()


def test_dropped_rows_change_the_order_as_a_filter_does(output: Output, tmp_path: Path) -> None:
    kept = [text for text in texts_of(output) if "caption 1" not in text]
    write_set(output.store, [kept], folder=tmp_path / "set")
    dataset = LatentDataset.open(output.uri)

    def made(**options: Any) -> LatentLoader:
        return LatentLoader(dataset, batch=1, epochs=1, sidecars="t5", missing_sidecars="drop", **options)

    with made() as loader, made(dp_rank=0) as again, LatentLoader(dataset, batch=1, epochs=1) as plain:
        found = list(loader)
        assert {batch.captions[0] for batch in found} == set(kept)
        assert loader.stats()["sidecars_dropped"] == COUNT - len(found) == len(list(plain)) - len(found) > 0
        assert [again.peek(step) for step in range(len(again))] == [batch.ids for batch in found]
        assert loader.order_digest == again.order_digest != plain.order_digest
        state = loader.state_dict()
    write_set(output.store, [["caption 1 word"]], folder=tmp_path / "set")
    with made() as newer, pytest.raises(ConfigError, match=r"state: sidecars\[0\] was .*t5@1.*t5@2.*same sidecars"):
        newer.load_state_dict(state)
    with LatentLoader(dataset, batch=1, epochs=1, sidecars="t5@1", missing_sidecars="drop") as named:
        named.load_state_dict(state)
        assert named.step == len(found)


@pytest.mark.parametrize("method", ["read", "open_reader"])
def test_a_mount_that_fails_once_ends_no_run(output: Output, tmp_path: Path, monkeypatch: Any, method: str) -> None:
    write_set(output.store, [texts_of(output)], folder=tmp_path / "set")
    original, left = getattr(LocalStore, method), [1]

    def failing(self: LocalStore, key: str, *arguments: Any) -> Any:
        if key.startswith(data_prefix("t5")) and left[0]:  # an index is read, a reader of tensors is opened
            left[0] -= 1
            raise StorageUnavailable("Input/output error")
        return original(self, key, *arguments)

    with LatentLoader(LatentDataset.open(output.uri), batch=1, epochs=1, sidecars="t5") as loader:
        monkeypatch.setattr(LocalStore, method, failing)
        for batch in loader:
            check(batch)
        assert (left, loader.stats()["retries"]) == ([0], 1)


def test_a_mount_that_fails_at_each_first_read_of_a_set_is_asked_again(
    output: Output, tmp_path: Path, monkeypatch: Any
) -> None:
    write_set(output.store, [texts_of(output)], folder=tmp_path / "set")
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.0)
    dataset, original, seen = LatentDataset.open(output.uri), LocalStore.read, set()

    def failing(self: LocalStore, key: str, *arguments: Any) -> Any:
        if key not in seen:
            seen.add(key)
            raise StorageUnavailable("Input/output error")
        return original(self, key, *arguments)

    monkeypatch.setattr(LocalStore, "read", failing)
    with LatentLoader(dataset, batch=1, epochs=1, sidecars="t5", caption_dropout=0.5) as loader:
        assert seen
        for batch in loader:
            check(batch)
        opened = loader._joins[0]._open["t5"]
        assert len(opened) > 0
    assert len(opened) == 0


def test_the_version_is_in_the_state_and_older_states_have_none(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [texts_of(output)], folder=tmp_path / "set")
    dataset = LatentDataset.open(output.uri)
    with LatentLoader(dataset, batch=1, sidecars="t5") as loader, LatentLoader(dataset, batch=1) as plain:
        assert loader.state_dict()["order"]["sidecars"] == [[f"t5@1:{TEXT.fingerprint[:8]}:error"]]
        assert [loader.peek(step) for step in range(COUNT)] == [plain.peek(step) for step in range(COUNT)]
        old = plain.state_dict()
        del old["order"]["sidecars"]
        plain.load_state_dict(old)
        state = loader.state_dict()
    write_set(output.store, [["more"]], folder=tmp_path / "set")
    with (
        LatentLoader(dataset, batch=1, sidecars="t5") as newer,
        pytest.raises(ConfigError, match=r"sidecars\[0\] was .*t5@1.*t5@2"),
    ):
        newer.load_state_dict(state)


def test_a_version_that_covers_the_snapshot_is_believed_without_reading_an_index(
    output: Output, tmp_path: Path
) -> None:
    dataset = LatentDataset.open(output.uri)
    coverage = Coverage(1, ("caption",), dataset.spec.fingerprint)
    write_set(output.store, [texts_of(output)], folder=tmp_path / "set", coverage=coverage)
    for path in Path(output.uri, "_index").rglob("*.idx"):
        path.rename(path.with_suffix(".away"))
    with LatentLoader(dataset, batch=1, sidecars="t5") as loader:
        assert loader.state_dict()["step"] == 0
    with pytest.raises(InputError):  # other captions than the version covers
        LatentLoader(dataset, batch=1, sidecars="t5", captions="metadata.long")


def test_tensors_by_id_and_by_caption_are_joined_together(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [texts_of(output)], folder=tmp_path / "set")
    ids = sorted(output.clips)
    write_set(output.store, [ids[:5], ids[5:]], BYTES, folder=tmp_path / "set")
    with LatentLoader(LatentDataset.open(output.uri), batch=2, epochs=1, sidecars=("t5", "pixels")) as loader:
        for batch in loader:
            check(batch)
            for i, name in enumerate(batch.ids):
                assert np.array_equal(
                    batch.sidecars["pixels"]["embedding"][i].to(torch.float32).numpy(),
                    values_of(name, tokens=2)["embedding"],
                )


def test_a_row_that_is_taken_down_is_not_shown_with_its_tensors(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [texts_of(output)], folder=tmp_path / "set")
    gone, *ids = sorted(output.clips)
    write_set(output.store, [ids], BYTES, folder=tmp_path / "set")
    with pytest.raises(InputError, match=f"1 of 12 rows .* such as {gone}"):
        LatentLoader(LatentDataset.open(output.uri), batch=1, sidecars="pixels")
    record_takedown(output.store, "asked for", ids=[gone])
    LatentLoader(LatentDataset.open(output.uri), batch=1, sidecars="pixels").close()
    found = batches(output)
    assert gone not in {name for batch in found for name in batch.ids}
    for batch in found:
        check(batch)


def test_sets_that_were_made_differently_are_not_mixed(tmp_path: Path) -> None:
    from dataclasses import replace

    first, second = films(tmp_path / "one"), films(tmp_path / "two")
    write_set(first.store, [texts_of(first)], folder=tmp_path / "set")
    write_set(second.store, [texts_of(second)], replace(TEXT, parts={"encoder": "other"}), folder=tmp_path / "set")
    with pytest.raises(ConfigError, match="the sets t5 of the datasets were made differently, fingerprints"):
        LatentLoader([LatentDataset.open(first.uri), LatentDataset.open(second.uri)], batch=1, sidecars="t5")


def test_dropout_needs_tensors_of_the_empty_caption(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [[text for text in texts_of(output) if text]], folder=tmp_path / "set")
    with pytest.raises(ConfigError, match="caption_dropout: sidecar set t5 has no tensors of the empty caption"):
        batches(output, caption_dropout=0.1, missing_sidecars="zero")


def test_damaged_tensors_stop_the_run(output: Output, tmp_path: Path) -> None:
    write_set(output.store, [texts_of(output)], folder=tmp_path / "set")
    reader = SidecarReader(output.store, "t5")
    (position,) = reader.find([key_of("")])
    assert position is not None
    path = Path(output.store.uri(receipts(output.store)[0].key))
    data = bytearray(path.read_bytes())
    data[reader.place(position, "pooled").offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="pooled of sidecar set t5 is damaged"):
        batches(output, verify="always")
    assert SetVersions(output.store, "t5").numbers() == [1]


def test_a_batch_of_tensors_without_values_has_their_shape(output: Output, tmp_path: Path) -> None:
    described = SidecarSet("none", BY_CAPTION, {"embedding": TensorKind("bfloat16", (None, WIDTH))}, {})
    create_set(output.store, described)
    keys = [key_of(text) for text in texts_of(output)]
    rows = [(key, key.hex(), {"embedding": np.zeros((0, WIDTH), np.uint16)}) for key in keys]
    store_unit(output.store, described, unit_of(described.fingerprint, keys), "0" * 16, rows, tmp_path)
    SetVersions(output.store, "none").publish()
    with LatentLoader(LatentDataset.open(output.uri), batch=1, sidecars="none") as loader:
        (found,) = next(iter(loader)).sidecars["none"]["embedding"]
    assert (found.dtype, found.shape) == (torch.bfloat16, (0, WIDTH))


def test_several_datasets_have_versions_of_their_own(output: Output, tmp_path: Path) -> None:
    """A run that resumes names both, also where another version of one set was made meanwhile."""
    clips = [clip_of(100 + seed, SHORT, caption=caption(seed)) for seed in range(2)]
    second = write_output(tmp_path / "second", tmp_path / "spool", [clips])
    for each in (output, second):
        write_set(each.store, [texts_of(each)], folder=tmp_path / "set")
    datasets = [LatentDataset.open(each.uri) for each in (output, second)]
    write_set(second.store, [["more"]], folder=tmp_path / "set")
    write_set(second.store, [["other"]], folder=tmp_path / "set")
    state = LatentLoader(datasets, batch=1, sidecars=[("t5",), ("t5@2",)]).state_dict()
    assert [one[0].partition(":")[0] for one in state["order"]["sidecars"]] == ["t5@1", "t5@2"]
    with LatentLoader(datasets, batch=1, sidecars=[("t5@1",), ("t5@2",)], dp_world=1) as loader:
        loader.load_state_dict(state)
        check(next(iter(loader)))
    for wrong, message in (
        ([("t5",)], "a list of names for each of 2 datasets"),
        ([("t5",), ()], "the same sets for every dataset"),
        ([("t5",), 5], "expected a list of strings"),
    ):
        with pytest.raises(ConfigError, match=message):
            LatentLoader(datasets, batch=1, sidecars=wrong)
