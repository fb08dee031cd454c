"""Takedowns that are recorded while an earlier look for them is under way: what was applied stays applied."""

from __future__ import annotations

from concurrent.futures import wait

import pytest
import torch.distributed as dist

from pipeline.ledger.takedowns import record_takedown, record_undo
from pipeline.loader import LatentDataset, LatentLoader
from tests.loader.outputs import SHORT, clip_of, write_output


@pytest.fixture
def output(tmp_path):
    return write_output(tmp_path / "out", tmp_path, [[clip_of(100 * s + n, SHORT) for n in range(6)] for s in range(2)])


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def loader_after_a_look(dataset, **options):
    """A loader with a look that is done and not yet applied, and its batches; the next look would begin after 300 s."""
    loader = LatentLoader(dataset, batch=2, prefetch=1, **options)
    batches, loader._watch._looked = iter(loader), -1e9
    next(batches)
    wait([loader._watch._look], timeout=300)
    return loader, batches


def look_in_the_background(loader, batches):
    """Ends a look that may be under way, and applies what the next one finds."""
    for _ in range(2):
        loader._watch._looked = -1e9
        next(batches)
        wait([loader._watch._look], timeout=300)
    next(batches)


@pytest.mark.parametrize("peers", [False, True])
def test_what_a_look_found_is_not_undone_by_one_that_began_before(output, alone, peers):
    dataset = LatentDataset.open(output.uri)
    loader, batches = loader_after_a_look(dataset, peers=alone if peers else None)
    gone = loader.peek(3)[0]
    record_takedown(output.store, "asked", ids=[gone])
    loader.look_for_takedowns()
    for _ in range(6):
        assert gone not in next(batches).ids
        assert len(loader._datasets[0].takedowns.records) == 1
    loader.close()


@pytest.mark.parametrize("other", ["loader", "dataset"])
def test_what_another_loader_of_a_dataset_applied_is_not_undone(output, other):
    dataset = LatentDataset.open(output.uri)
    training, batches = loader_after_a_look(dataset)
    gone = training.peek(3)[0]
    record_takedown(output.store, "asked", ids=[gone])
    if other == "loader":
        validation, others = loader_after_a_look(dataset, seed=5)
        next(others)
        validation.close()
    else:
        dataset.look_for_takedowns()
    assert len(dataset.takedowns.records) == 1
    for _ in range(6):
        assert gone not in next(batches).ids
        assert len(dataset.takedowns.records) == 1
    record_takedown(output.store, "asked", ids=[training.peek(12)[0]])
    look_in_the_background(training, batches)
    assert len(dataset.takedowns.records) == 2
    training.close()


def test_a_takedown_that_was_undone_shows_its_rows_again(output):
    dataset = LatentDataset.open(output.uri)
    loader, batches = loader_after_a_look(dataset)
    record = record_takedown(output.store, "asked", ids=[loader.peek(3)[0]])
    loader.look_for_takedowns()
    assert len(dataset.takedowns.records) == 1
    record_undo(output.store, record.key, "a mistake", "me")
    look_in_the_background(loader, batches)
    assert len(dataset.takedowns.records) == 0
    loader.close()
