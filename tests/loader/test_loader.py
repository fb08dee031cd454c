"""Batches of the loader: values, what they carry, ranks, resuming, and that memory is used again only when nobody holds it."""

from __future__ import annotations

import json
import threading
from itertools import islice

import numpy as np
import pytest
import torch

import pipeline
from pipeline.errors import ConfigError
from pipeline.loader import columns
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.loader import LatentLoader
from pipeline.loader.mixture import Weights
from pipeline.loader.rules import Pack, Tokens
from tests.loader.outputs import SHORT, clip_of, write_output
from tests.pipeline.latent_clips import values_of

KINDS = ("parquet", "moments", "tar", "tar_moments")


def opened(films, name="parquet", **options):
    return LatentDataset.open(films[name].uri, **options)


def ids_of(loader, steps):
    return [batch.ids for batch in islice(loader, steps)]


@pytest.mark.parametrize("name", KINDS)
def test_latents_are_the_stored_ones(films, name):
    dataset = opened(films, name, columns=("metadata", "width"))
    loader = LatentLoader(dataset, batch=3, epochs=1)
    seen = []
    for step, batch in enumerate(loader):
        assert (batch.step, batch.epoch, batch.dataset, len(batch)) == (step, 0, 0, 3)
        for i, name_of in enumerate(batch.ids):
            clip = films[name].clips[name_of]
            assert np.array_equal(batch.latents[i].float().numpy(), values_of(clip.latent_CTHW, dataset.spec.dtype))
            assert batch.captions[i] == clip.sample.caption
            assert batch.bucket == str(clip.plan.bucket)
            assert (batch.num_frames[i], batch.fps[i], batch.duration_s[i]) == (clip.num_frames, 8, clip.num_frames / 8)
            assert batch.is_image == (clip.num_frames == 1)
            assert batch.metadata[i] == clip.sample.metadata
            assert batch.columns["width"][i] == clip.plan.bucket.width
        assert batch.num_tokens.tolist() == [batch.latents.shape[2] * 2 * -(-batch.latents.shape[4] // 2)] * 3
        seen += batch.ids
    assert sorted(seen) == sorted(films[name].clips)
    assert len(loader) == loader.step == 15
    stats = loader.stats()
    assert (stats["batches"], stats["tensors"], stats["damaged"]) == (15, 45, 0)
    assert stats["bytes"] == sum(clip.latent_CTHW.nbytes for clip in films[name].clips.values())
    loader.close()


def test_columns_of_several_files_are_read_at_once(films, monkeypatch):
    together, original = threading.Barrier(3), columns.read_columns  # of three files

    def read_columns(*arguments):
        together.wait(60)  # until all are being read
        return original(*arguments)

    monkeypatch.setattr(columns, "read_columns", read_columns)
    dataset = opened(films, where="num_frames = 9 and width = 24", columns=("metadata",))
    loader = LatentLoader(dataset, batch=16, epochs=1, prefetch=1, shuffle="none")
    batch = next(iter(loader))
    assert batch.metadata == [films["parquet"].clips[name].sample.metadata for name in batch.ids]


def test_constants_of_the_network_are_applied(films):
    raw = next(iter(LatentLoader(opened(films), batch=3)))
    model = next(iter(LatentLoader(opened(films), batch=3, normalize="model", dtype=torch.float32)))
    assert model.ids == raw.ids
    assert model.latents.dtype == torch.float32
    assert torch.allclose(model.latents, (raw.latents.float() - 0.1) * 0.5)
    half = next(iter(LatentLoader(opened(films), batch=3, normalize="model")))
    assert half.latents.dtype == torch.float16
    assert torch.equal(half.latents, model.latents.half())


def test_samples_of_the_posterior_follow_from_seed_epoch_and_row(films):
    def samples(world=1, rank=0, **options):
        found = {}
        loader = LatentLoader(
            opened(films, "tar_moments"), batch=4, posterior="sample", dp_rank=rank, dp_world=world, **options
        )
        for batch in islice(loader, 22):
            found |= {(name, batch.epoch): value for name, value in zip(batch.ids, batch.latents, strict=True)}
        return found

    whole, rank = samples(), samples(world=2, rank=1)
    assert rank
    assert all(torch.equal(value, whole[key]) for key, value in rank.items())
    name = next(key[0] for key in whole if (key[0], 1) in whole and key[1] == 0)
    assert not torch.equal(whole[name, 0], whole[name, 1])
    assert not torch.equal(whole[name, 0], samples(seed=1).get((name, 0), torch.zeros(1)))
    clip = films["tar_moments"].clips[name]
    z = (whole[name, 0].numpy() - clip.latent_CTHW) / np.exp(0.5 * np.clip(clip.logvar_CTHW, -30, 20))
    assert abs(z.mean()) < 0.35
    assert 0.7 < z.std() < 1.3


def test_batches_that_are_kept_are_not_overwritten(films):
    loader = LatentLoader(opened(films), batch=3, epochs=6, prefetch=2)
    kept = list(loader)
    for batch in kept:
        for value, name in zip(batch.latents, batch.ids, strict=True):
            assert np.array_equal(value.float().numpy(), values_of(films["parquet"].clips[name].latent_CTHW, "float16"))


def test_memory_of_batches_that_are_gone_is_used_again(films):
    loader = LatentLoader(opened(films, where="num_frames = 9 and width = 24"), batch=3, epochs=20, prefetch=2)
    part = None
    for batch in loader:
        part = batch.latents[0, 0]  # a view of part of it holds all of it
        del batch
    assert loader._makers[0]._reader._memory.allocated <= 6
    assert part is not None


@pytest.mark.parametrize(
    "rule",
    [4, {"9x32x24": 6, "v9x32x40": (4, 0.5)}, Tokens(36, multiple=2), Pack(36, sequences=2)],
    ids=["number", "mapping", "tokens", "pack"],
)
def test_ranks_share_each_global_batch(films, rule):
    whole = [LatentLoader(opened(films), batch=rule, seed=2)]
    ranks = [LatentLoader(opened(films), batch=rule, seed=2, dp_rank=rank, dp_world=2) for rank in range(2)]
    for batch, one, two, _ in zip(*whole, *ranks, range(12), strict=False):
        assert one.ids + two.ids == batch.ids
        if not isinstance(rule, Pack):
            assert one.bucket == two.bucket == batch.bucket
            assert len(one) == len(two)
            assert torch.equal(torch.cat([one.latents, two.latents]), batch.latents)


def test_packed_latents_lie_within_their_bounds(films):
    rule = Pack(30, sequences=2, pad_multiple=10, window=16)
    loader = LatentLoader(opened(films), batch=rule, epochs=1, drop_last=False)
    seen = set()
    for batch in loader:
        assert sum(batch.sequences) == len(batch.latents) == len(batch.bucket)
        at = 0
        for count, bounds, grids in zip(batch.sequences, batch.cu_seqlens, batch.grid_sizes, strict=True):
            tokens = batch.num_tokens[at : at + count]
            assert bounds[: count + 1].tolist() == [0, *tokens.cumsum(0).tolist()]
            assert bounds[-1] % 10 == 0
            assert bounds[-1] <= 30
            assert grids.prod(1).tolist() == tokens.tolist()
            for latent, grid in zip(batch.latents[at : at + count], grids.tolist(), strict=True):
                assert [latent.shape[1], -(-latent.shape[2] // 2), -(-latent.shape[3] // 2)] == grid
            at += count
        for value, name in zip(batch.latents, batch.ids, strict=True):
            assert np.array_equal(value.float().numpy(), values_of(films["parquet"].clips[name].latent_CTHW, "float16"))
        seen |= set(batch.ids)
    assert seen == set(films["parquet"].clips)


def test_images_come_at_their_ratio(films):
    loader = LatentLoader(opened(films), batch=2, image_ratio=0.25)
    found = [batch.is_image for batch in islice(loader, 80)]
    assert abs(sum(found) / 80 - 0.25) < 0.05


# ---- steps -------------------------------------------------------------------------------------------------------------


def test_a_state_goes_on_after_the_last_batch_on_any_number_of_ranks(films):
    whole = ids_of(LatentLoader(opened(films), batch=4, seed=5), 30)
    loader = LatentLoader(opened(films), batch=4, seed=5)
    assert ids_of(loader, 7) == whole[:7]
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["step"] == 7
    ranks = [LatentLoader(opened(films), batch=4, seed=5, dp_rank=rank, dp_world=4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(state)
    middle = [ids_of(rank, 9) for rank in ranks]
    assert [[name for share in shares for name in share] for shares in zip(*middle, strict=True)] == whole[7:16]
    assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1
    last = LatentLoader(opened(films), batch=4, seed=5)
    last.load_state_dict(ranks[3].state_dict())
    assert ids_of(last, 14) == whole[16:]


def test_a_seed_of_numpy_is_the_number(films):
    found = [LatentLoader(opened(films), batch=4, seed=seed) for seed in (3, np.int64(3))]
    assert found[0].peek(2) == found[1].peek(2)
    assert json.dumps(found[0].state_dict()) == json.dumps(found[1].state_dict())


def test_steps_can_be_left_out_and_looked_at(films):
    whole = ids_of(LatentLoader(opened(films), batch=4), 12)
    loader = LatentLoader(opened(films), batch=4)
    assert loader.peek(5) == whole[5]
    assert loader.stats()["tensors"] == 0
    loader.skip(3)
    assert ids_of(loader, 2) == whole[3:5]
    loader.seek(1)
    assert ids_of(loader, 2) == whole[1:3]
    assert next(iter(loader)).ids == whole[3]
    for step in (-1, 1.5, "3"):
        with pytest.raises(ConfigError, match=f"seek: step: expected a whole number >= 0, got {step!r}"):
            loader.seek(step)


def test_counted_epochs_end_and_endless_ones_have_no_length(films):
    loader = LatentLoader(opened(films), batch=4, epochs=2)
    assert len(loader) == len(list(loader)) == 2 * (3 + 4 + 3)
    with pytest.raises(ConfigError, match=r"has given all its 20 steps.*give epochs=N to read all N times, or"):
        list(loader)
    assert loader.peek(20) == []
    resumed = LatentLoader(opened(films), batch=4, epochs=2)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []  # a run that was finished
    loader.seek(18)
    assert len(list(loader)) == 2
    endless = LatentLoader(opened(films), batch=4)
    with pytest.raises(TypeError, match="no end"):
        len(endless)
    assert endless
    assert endless.as_iterable_dataset()


@pytest.mark.parametrize("more", [3, None])
def test_a_finished_run_goes_on_with_more_epochs(films, more):
    def loader(epochs):
        return LatentLoader(opened(films), batch=4, epochs=epochs)

    whole = ids_of(loader(more), 24)
    finished = loader(2)
    assert ids_of(finished, 24) == whole[:20]
    longer = loader(more)
    longer.load_state_dict(finished.state_dict())
    assert ids_of(longer, 4) == whole[20:]
    with pytest.raises(
        ConfigError, match=r"state: 24 steps were given with epochs=\w+, this loader has 20 with epochs=2; give"
    ):
        loader(2).load_state_dict(longer.state_dict())
    longer.seek(20)
    shorter = loader(2)
    shorter.load_state_dict(longer.state_dict())
    assert list(shorter) == []


@pytest.mark.parametrize("filled", ["by hand", "by torch.distributed.checkpoint"])
def test_a_state_that_is_filled_in_place_leaves_the_loader_as_it_is(films, filled, tmp_path):
    loader, other = (LatentLoader(opened(films), batch=4, seed=seed) for seed in (0, 1))
    digest = other.order_digest
    if filled == "by hand":
        other.state_dict()["order"]["seed"] = 0
        with pytest.raises(ConfigError, match="state: seed was 0, this loader has 1"):
            other.load_state_dict(loader.state_dict())
    else:
        import torch.distributed.checkpoint as dcp

        dcp.save({"loader": loader}, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
        with pytest.raises(ConfigError, match="state: seed was 0, this loader has 1"):
            dcp.load({"loader": other}, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
    assert other.order_digest == digest
    counters = other.stats()
    counters["damage"].append("a row")
    assert other.stats()["damage"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"state: seed was 0, this loader has 1"),
        ({"batch": 2}, r"state: batch was 'Same\(size=4\)', this loader has 'Same\(size=2\)'"),
        ({"shuffle": "full"}, r"state: shuffle was 'window:64', this loader has 'full'"),
        ({"where": "num_frames > 1"}, r"state: where of datasets\[0\] was None, this loader has 'num_frames > 1', so"),
        ({"epochs": 3, "image_ratio": 0.5}, r"state: epochs was None, this loader has 3"),
        ({"drop_last": False}, r"state: drop_last was True, this loader has False"),
        ({"image_ratio": 0.5}, r"state: image_ratio was None, this loader has 0.5"),
        (
            {"kind": "tar"},
            r"state: list of files of datasets\[0\] was '\w{16}', this loader has '\w{16}'.*the same datasets",
        ),
        ({"weights": [2.0]}, r"state: weights was None, this loader has"),
    ],
)
def test_a_state_of_another_order_is_refused(films, changes, message):
    state = LatentLoader(opened(films), batch=4, image_ratio=0.5 if "epochs" in changes else None).state_dict()
    changes = {"batch": 4, **changes}
    dataset = opened(films, changes.pop("kind", "parquet"), where=changes.pop("where", None))
    with pytest.raises(ConfigError, match=message):
        LatentLoader(dataset, **changes).load_state_dict(state)


def test_a_state_says_which_dataset_was_another_and_in_what(films, tmp_path):
    output = write_output(tmp_path / "out", tmp_path, [[clip_of(n, SHORT) for n in range(3)]])
    long = f"num_frames > 1 and caption not in ({', '.join(map(repr, 'abcdefghijklmnopqrstuvwxyz' * 20))})"
    wheres = [long, *(f"num_frames > {-n}" for n in range(8)), f"{long} and width > 4"]

    def loader(newest, *changed, **options):
        datasets = [opened(films, where=where) for where in (*wheres[: len(wheres) - len(changed)], *changed)]
        return LatentLoader([*datasets, newest], batch=1, small_buckets="drop", **options)

    newest = LatentDataset.open(output.uri)
    state = json.loads(json.dumps(loader(newest).state_dict()))
    write_output(output.uri, tmp_path, [[clip_of(100 + n, SHORT) for n in range(3)]], first=1)
    moved = LatentDataset.open(output.uri)
    for other, message in (
        (
            loader(newest, f"{long} and width > 5"),
            r"where of datasets\[9\] was …[^…]*> 4\", this loader has …[^…]*> 5\"",
        ),
        (loader(moved), rf"snapshot of datasets\[10\] was '1', this loader has '2'.*; open {output.uri}@1, or start"),
        (
            LatentLoader([newest], batch=1),
            r"number of datasets was 11, this loader has 1, so .*; open it with the same",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^state: {message}") as refused:
            other.load_state_dict(state)
        assert len(str(refused.value)) < 900
    state = LatentLoader(moved, batch=1).state_dict()
    received = LatentLoader(LatentDataset.open(output.uri, receipts=True), batch=1)
    with pytest.raises(
        ConfigError, match=rf"snapshot of datasets\[0\] was '2', this loader has 'receipts'.*open {output.uri}@2"
    ):
        received.load_state_dict(state)
    with pytest.raises(
        ConfigError, match=r"snapshot of datasets\[0\] was 'receipts', .*open it with the same datasets"
    ):
        LatentLoader(moved, batch=1).load_state_dict(received.state_dict())


def test_weights_may_change_after_the_step_of_the_state_but_not_before(films):
    def loader(weights):
        return LatentLoader([opened(films), opened(films, where="num_frames > 1")], batch=3, weights=weights)

    first = loader({0: (1, 1), 6: (1, 0)})
    whole = [batch.dataset for batch in islice(first, 12)]
    assert set(whole[6:]) == {0}
    assert set(whole[:6]) == {0, 1}
    state = first.state_dict()
    loader([Weights(0, (1, 1)), Weights(6, (1, 0)), Weights(40, (0, 1))]).load_state_dict(state)
    with pytest.raises(
        ConfigError, match=r"state: weights was \[\[0, \[1.0, 1.0\]\], \[6, \[1.0, 0.0\]\]\], this loader"
    ):
        loader((1, 1)).load_state_dict(state)


def test_a_state_does_not_depend_on_the_types_of_numbers(films):
    numbers = {"batch": 4, "seed": 5, "epochs": 2, "dp_world": 2, "prefetch": 3, "image_ratio": 0.5}
    one = LatentLoader(opened(films), **numbers)
    two = LatentLoader(opened(films), **{name: np.array(value)[()] for name, value in numbers.items()})
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert json.dumps(one.state_dict()) == json.dumps(two.state_dict())
    assert one.peek(3) == two.peek(3)
    for step in (2.7, -3, "x", None):
        with pytest.raises(ConfigError, match=rf"state: step: expected a whole number >= 0, got {step!r}"):
            one.load_state_dict({**one.state_dict(), "step": step})


@pytest.mark.parametrize("state", [{}, {"version": 9}, None, {"version": 1, "step": 3}, {"version": 1, "order": {}}])
def test_what_is_not_a_state_is_refused(films, state):
    with pytest.raises(ConfigError, match=r"state: expected one of version 1 that a loader's state_dict\(\) gave"):
        LatentLoader(opened(films), batch=4).load_state_dict(state)


def test_the_package_names_it():
    assert pipeline.LatentLoader is LatentLoader
