"""Sidecar sets on disk: files that other tools read, receipts that count once, versions that never change a tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import DrillConfig
from pipeline.errors import BuildError, ConfigError, InputError, OutputError, TransientError
from pipeline.sidecars.description import create_set, set_names
from pipeline.sidecars.names import key_of, receipt_key, version_key
from pipeline.sidecars.reading import SidecarReader
from pipeline.sidecars.receipts import SidecarReceipts
from pipeline.sidecars.versions import Coverage, SetVersions
from pipeline.storage import Store
from tests.pipeline.latent_clips import local_store
from tests.sidecars.sets import BYTES, TEXT, WIDTH, bits_of, receipts, values_of, write_set, write_unit

WORDS = ["", "a dog", "a cat runs", "Ein Café", "x " * 300, "the same end\0", "zero"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return local_store(tmp_path / "out")


def read_back(reader: SidecarReader, text: str) -> dict[str, np.ndarray]:
    found = reader.tensors(text)
    assert found is not None
    return found


def test_tensors_come_back_by_caption_as_they_were_written(store: Store, tmp_path: Path) -> None:
    version = write_set(store, [WORDS[:3], WORDS[3:]], folder=tmp_path / "spool")
    assert (version.number, version.rows, version.files) == (1, len(WORDS), 2)
    reader = SidecarReader(store, "t5")
    for text in WORDS:
        found, wanted = read_back(reader, text), values_of(text)
        for name, kind in TEXT.tensors.items():
            assert np.array_equal(found[name], bits_of(wanted[name], kind.dtype)), (text, name)
    assert reader.tensors("not there") is None
    assert list(reader.has([key_of("a dog"), key_of("no")])) == [True, False]


def test_a_file_is_parquet_and_its_index_has_every_byte_range(store: Store, tmp_path: Path) -> None:
    receipt = write_unit(store, WORDS, folder=tmp_path)
    table = pq.read_table(store.uri(receipt.key))
    assert table.column_names[:4] == ["caption_hash", "embedding_bytes", "embedding_shape", "embedding_dtype"]
    assert table["caption_hash"].to_pylist() == [key_of(text).hex() for text in WORDS]
    index = pq.read_table(store.uri(receipt.index_key))
    data = Path(store.uri(receipt.key)).read_bytes()
    for row, text in enumerate(WORDS):
        at, size = (index[f"embedding_{part}"][row].as_py() for part in ("offset", "length"))
        assert data[at : at + size] == bits_of(values_of(text)["embedding"], "bfloat16").tobytes()
        assert index["embedding_shape"][row].as_py() == [len(text.split()) + 1, WIDTH]
    assert receipt.stats["pooled"].n == WIDTH * len(WORDS)
    assert receipt.stats["pooled"].mean[0] == pytest.approx(np.mean([values_of(text)["pooled"] for text in WORDS]))


def test_of_two_attempts_at_a_unit_the_first_counts_and_the_second_leaves_no_file(store: Store, tmp_path: Path) -> None:
    first = write_unit(store, WORDS, folder=tmp_path)
    before = set(store.keys("_sidecars/"))
    assert write_unit(store, list(reversed(WORDS)), folder=tmp_path) == first
    assert set(store.keys("_sidecars/")) == before


def test_a_row_of_two_units_counts_in_the_file_that_showed_it_first(store: Store, tmp_path: Path) -> None:
    version = write_set(store, [["a", "b"]], folder=tmp_path)
    second = write_set(store, [["c", "b"], ["b", "c", "d"]], folder=tmp_path)
    assert (version.number, second.number, second.rows, second.files) == (1, 2, 4, 3)
    old, new = SidecarReader(store, "t5@1"), SidecarReader(store, "t5")
    assert (len(old), len(new), new.number) == (2, 4, 2)
    assert new.find([key_of("b")]) == old.find([key_of("b")])
    for text in "abcd":
        assert np.array_equal(read_back(new, text)["pooled"], values_of(text)["pooled"])


def test_keys_that_are_done_are_those_of_receipts_also_before_a_version_names_them(
    store: Store, tmp_path: Path
) -> None:
    write_set(store, [["a", "b"]], folder=tmp_path)
    write_unit(store, ["c"], folder=tmp_path)
    done = SetVersions(store, "t5").keys_done()
    assert sorted(done.tolist()) == sorted(key_of(text).rstrip(b"\0") for text in "abc")


def test_nothing_new_makes_no_version_and_a_new_coverage_does(store: Store, tmp_path: Path) -> None:
    versions = SetVersions(store, "t5")
    write_set(store, [["a"]], folder=tmp_path, coverage=Coverage(1, ("caption",)))
    assert versions.publish().number == versions.publish(Coverage(1, ("caption",))).number == 1
    assert versions.publish(Coverage(2, ("caption",))).covers == (Coverage(1, ("caption",)), Coverage(2, ("caption",)))
    assert versions.numbers() == [1, 2]


def test_a_version_that_another_run_made_meanwhile_is_built_upon(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_unit(store, ["a"], folder=tmp_path)
    real, theirs = store.put_if_absent, []

    def second(key: str, data: bytes) -> bool:
        if key == version_key("t5", 1) and not theirs:
            theirs.append(key)
            write_unit(store, ["b"], folder=tmp_path)
            SetVersions(store, "t5").publish()
        return real(key, data)

    monkeypatch.setattr(store, "put_if_absent", second)
    made = SetVersions(store, "t5").publish(Coverage(1))
    assert (made.number, made.rows, made.covers) == (2, 2, (Coverage(1),))


def test_an_empty_receipt_or_record_counts_as_none(store: Store, tmp_path: Path) -> None:
    receipt = write_unit(store, ["a"], folder=tmp_path)
    Path(store.uri(receipt_key("t5", receipt.unit))).write_bytes(b"")
    Path(store.uri(version_key("t5", 1))).parent.mkdir(parents=True)
    Path(store.uri(version_key("t5", 1))).write_bytes(b"")
    assert SidecarReceipts(store, "t5").find(receipt.unit) is None
    with pytest.raises(InputError, match="is not finished; run `lathe embed` again"):
        SidecarReader(store, "t5")
    again = write_unit(store, ["a"], folder=tmp_path)
    assert [one.attempt for one in receipts(store)] == [again.attempt]
    assert SetVersions(store, "t5").publish().number == 2


def test_a_set_of_other_settings_or_tensors_is_refused_by_name(store: Store) -> None:
    create_set(store, TEXT)
    create_set(store, TEXT)
    with pytest.raises(ConfigError, match=r"encoder made up, now other; use the same settings, or another --name"):
        create_set(store, replace(TEXT, parts={"encoder": "other"}))
    with pytest.raises(ConfigError, match=r"tensors .*now .*float16 \[2, 6\]"):
        create_set(store, replace(BYTES, name="t5", parts=TEXT.parts, key=TEXT.key))
    create_set(store, BYTES)
    assert set_names(store) == ["pixels", "t5"]
    with pytest.raises(InputError, match=r"no sidecar set 'clip'; there are pixels, t5"):
        SidecarReader(store, "clip")
    with pytest.raises(ConfigError, match="expected a name of a-z"):
        SidecarReader(store, "../t5")


def test_values_that_are_not_finite_are_refused_and_leave_no_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.sidecars import sets

    broken = {**values_of("a"), "pooled": np.array([1, np.nan, 0, 0, 0, 0], np.float32)}
    monkeypatch.setattr(sets, "values_of", lambda text, tokens=None: broken)
    with pytest.raises(BuildError, match=r"pooled of .* has values that are not finite in float32"):
        write_unit(store, ["a"], folder=tmp_path)
    assert not [*tmp_path.glob("*.sidecar"), *receipts(store)]


def test_damage_is_found_when_it_is_read(store: Store, tmp_path: Path) -> None:
    receipt = write_set(store, [["a dog"]], folder=tmp_path) and receipts(store)[0]
    index = pq.read_table(store.uri(receipt.index_key))
    path, at = Path(store.uri(receipt.key)), index["pooled_offset"][0].as_py()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="pooled of sidecar set t5 is damaged; see `lathe sidecar verify`"):
        SidecarReader(store, "t5").tensors("a dog")
    version = SetVersions(store, "t5").read()
    Path(store.uri(version.table)).write_bytes(b"PAR1")
    with pytest.raises(OutputError, match="is not the table that was recorded"):
        SidecarReader(store, "t5")


def test_a_kill_before_the_receipt_leaves_a_file_that_no_reader_sees(store: Store, tmp_path: Path) -> None:
    failures = DrillConfig(point="before_commit", action="raise", marker_dir=str(tmp_path / "marks"))
    from pipeline.sidecars.names import unit_of
    from pipeline.sidecars.storing import store_unit

    create_set(store, TEXT)
    key = key_of("a")
    rows = [(key, key.hex(), {n: bits_of(v, TEXT.tensors[n].dtype) for n, v in values_of("a").items()})]
    unit = unit_of(TEXT.fingerprint, [key])
    with pytest.raises(TransientError, match="before_commit"):
        store_unit(store, TEXT, unit, "ab", rows, tmp_path, failures=failures)
    assert len(SetVersions(store, "t5").keys_done()) == 0
    assert store_unit(store, TEXT, unit, "cd", rows, tmp_path, failures=failures).attempt == "cd"
    assert json.loads(store.read(receipt_key("t5", unit)))["rows"] == 1
