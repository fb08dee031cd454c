"""A short run of the fuzzer with fixed seeds (`make fuzz` uses others), and tests of its checks."""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz import batch as batches
from tests.fuzz.mutations import mutate
from tests.odd_inputs.table import small


@pytest.mark.parametrize("seed", [2])
def test_mutants_are_encoded_or_rejected(seed, tmp_path):
    batch = batches.make(tmp_path / "batch", seed, mutants=60, files=10, tars=6)
    found, reasons = batches.check(batch)
    assert not found
    assert reasons.total() > 10, "hardly anything was harmed"


def test_a_batch_depends_only_on_its_seed(tmp_path):
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name / "batch"
        batch = batches.make(folder, 5, mutants=5, files=3, tars=2)
        made.append({path.name: path.read_bytes() for path in batch.inputs.iterdir()})
    assert made[0] == made[1]
    assert mutate(small(), random.Random(1)) == mutate(small(), random.Random(1)) != mutate(small(), random.Random(2))


def test_a_leftover_file_is_detected(tmp_path):
    batch = batches.make(tmp_path / "batch", 0, mutants=1, files=0, tars=0)
    before = batches.surroundings(batch)
    (tmp_path / "escaped.mp4").touch()
    assert batches.surroundings(batch) - before == {str(tmp_path / "escaped.mp4")}


def test_reading_outside_the_inputs_is_detected(tmp_path):
    batch = batches.make(tmp_path / "batch", 0, mutants=1, files=0, tars=0)
    batches.forget_reading(batch)
    assert not batches.was_read(batch)
    batch.secret.read_bytes()
    if not batches.was_read(batch) and os.statvfs(tmp_path).f_flag & os.ST_NOATIME:
        pytest.skip("this file system keeps no times of access: the fuzzer cannot see what is read")
    assert batches.was_read(batch)


def test_a_lost_sample_and_a_missing_receipt_are_detected(tmp_path):
    batch = batches.make(tmp_path / "batch", 9, mutants=1, files=0, tars=0)
    batch.keys.add("vanished")
    batch.tars += 1
    found, _ = batches.check(batch)
    assert found == [
        "2 receipts, expected those of 2 tars and of the plain files",
        "neither encoded nor rejected: ['vanished']",
    ]
