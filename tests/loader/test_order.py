"""Order of global batches: the same for every number of ranks and from any step on; every row as often as the rule says."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.loader.draws import key_of, permutation, uniform
from pipeline.loader.epoch import BucketRows, RowsOfBucket, shuffled_rows
from pipeline.loader.mixture import Mixture, Weights
from pipeline.loader.order import DatasetRows, Order
from pipeline.loader.packing import first_fit
from pipeline.loader.rules import Pack, Tokens, parse_rule, tokens_of

GRIDS = {"1x64x64": (1, 8, 8), "9x64x64": (3, 8, 8), "17x64x96": (5, 8, 12)}


def dataset(name="a", **counts):
    """Buckets by short name: images, short, long."""
    names = dict(zip(("images", "short", "long"), GRIDS, strict=True))
    return DatasetRows(
        name, {names[key]: BucketRows(GRIDS[names[key]], np.array(value, np.int64)) for key, value in counts.items()}
    )


def members(share):
    """(bucket, row) of every latent of a share, in order."""
    if isinstance(share, RowsOfBucket):
        return [(share.bucket, int(row)) for row in share.rows]
    return [
        (bucket, int(row)) for sequence in share for bucket, row in zip(sequence.buckets, sequence.rows, strict=True)
    ]


rows = st.lists(st.integers(0, 40), min_size=1, max_size=6)
datasets = st.builds(
    lambda counts: [dataset(f"set{i}", images=c[0], short=c[1], long=c[2]) for i, c in enumerate(counts)],
    st.lists(st.tuples(rows, rows, rows), min_size=1, max_size=3),
)
rules = st.sampled_from(
    [
        parse_rule(16),
        parse_rule({"9x64x64": 32, "17x64x96": (16, 0.5)}),
        Tokens(2048, multiple=16),
        Pack(240, sequences=16, window=64),
    ]
)
shuffles = st.sampled_from(["none", "full", "window:1", "window:3"])


def order_or_none(*arguments, **options):
    try:
        return Order(*arguments, **options)
    except ConfigError as error:
        if "not one global batch" not in str(error):
            raise
        return None


@settings(max_examples=60, deadline=None)
@given(datasets, rules, shuffles, st.integers(0, 5), st.booleans(), st.integers(0, 30))
def test_ranks_together_read_the_same_batches_on_any_world_and_from_any_step(
    sets, rule, shuffle, seed, drop_last, start
):
    options = {"seed": seed, "shuffle": shuffle, "drop_last": drop_last, "small_buckets": "drop"}
    if (order := order_or_none(sets, rule, **options)) is None:
        return
    for world in (2, 4, 8, 16):
        resumed = Order(sets, rule, **options)  # nothing remembered of earlier steps
        resumed.check_world(world)
        for step in range(start, start + 6):
            whole, again = order.batch(step), resumed.batch(step)
            shares = [again.share(rank, world) for rank in range(world)]
            assert [member for share in shares for member in members(share)] == members(whole.share(0, 1))
            assert (again.dataset, again.epoch) == (whole.dataset, whole.epoch)
            if not isinstance(rule, Pack):
                assert len({(share.bucket, len(share.rows)) for share in shares}) == 1


@settings(max_examples=40, deadline=None)
@given(datasets, shuffles, st.integers(0, 5), st.integers(1, 3))
def test_an_epoch_reads_every_row_once_but_for_the_dropped_rest(sets, shuffle, seed, epochs):
    options = {"seed": seed, "shuffle": shuffle, "epochs": epochs, "small_buckets": "drop"}
    if (order := order_or_none(sets, parse_rule(8), **options)) is None:
        return
    seen = Counter()
    for step in range(order.total()):
        batch = order.batch(step)
        seen.update((batch.dataset, *member) for member in members(batch.content))
    assert order.batch(order.total()) is None
    for number, one in enumerate(sets):
        for bucket, found in one.buckets.items():
            counts = [seen[number, bucket, row] for row in range(found.total)]
            assert sum(counts) == epochs * (found.total // 8 * 8)
            assert max(counts, default=0) <= epochs


@given(datasets, rules, shuffles, st.integers(0, 1 << 60), st.booleans(), st.sampled_from([None, (2.0,)]))
@settings(max_examples=60, deadline=None)
def test_the_order_of_one_dataset_begins_with_that_of_fewer_epochs(sets, rule, shuffle, seed, drop_last, weights):
    """`pipeline.loader.state` relies on it: a state of fewer epochs is one of more."""

    def order(epochs):
        return order_or_none(
            sets[:1], rule, seed=seed, shuffle=shuffle, epochs=epochs, drop_last=drop_last, small_buckets="drop",
            weights=weights and [Weights(0, weights)],
        )  # fmt: skip

    if (few := order(2)) is None:
        return
    count = few.total()
    for more in (order(3), order(None)):
        for step in range(count):
            one, other = few.batch(step), more.batch(step)
            assert (one.dataset, one.epoch) == (other.dataset, other.epoch)
            assert members(one.content) == members(other.content)
        assert more.batch(count).epoch == 2
    assert few.batch(count) is None


def test_rows_of_the_last_batch_are_filled_up_from_the_start_where_nothing_is_dropped():
    order = Order([dataset(short=[10, 3])], parse_rule(8), epochs=1, drop_last=False)
    found = [member for step in range(order.total()) for member in members(order.batch(step).content)]
    assert len(found) == 16
    assert {row for _, row in found} == set(range(13))


def test_few_sequences_fill_a_batch_by_going_round_more_than_once():
    order = Order([dataset(short=[3])], Pack(48, sequences=16), drop_last=False)
    batch = order.batch(0)
    assert [len(batch.share(rank, 8)) for rank in range(8)] == [2] * 8
    assert {row for _, row in members(batch.content)} == {0, 1, 2}


def test_another_seed_or_epoch_or_dataset_is_another_order():
    def first(identity="a", seed=0, step=0):
        return members(Order([dataset(identity, short=[500])], parse_rule(50), seed=seed).batch(step).content)

    assert first() == first()
    assert len({str(first()), str(first(seed=1)), str(first(identity="b")), str(first(step=10))}) == 4


def test_the_order_is_the_one_of_today():
    """A run of last year resumes only if these numbers never change."""
    order = Order([dataset(images=[7], short=[5, 4, 3], long=[9])], parse_rule(4), seed=3, shuffle="window:2")
    assert [members(order.batch(step).content) for step in (0, 3, 8)] == PINNED
    assert permutation(key_of("x", 1), 8).tolist() == PINNED_PERMUTATION
    assert np.allclose(uniform(key_of("x", 1), 3), PINNED_UNIFORM)


def test_a_window_holds_rows_of_that_many_files():
    counts = np.array([5, 1, 7, 3, 4], np.int64)
    file_of = np.repeat(np.arange(5), counts)
    found = file_of[shuffled_rows(counts, 2, 9)]
    files = list(dict.fromkeys(found.tolist()))
    assert sorted(shuffled_rows(counts, 2, 9).tolist()) == list(range(20))
    windows, at = [], 0
    while at < len(found):
        held = set(found[at:].tolist()[:1])
        size = 0
        while at + size < len(found) and len(held | {int(found[at + size])}) <= 2:
            held.add(int(found[at + size]))
            size += 1
        windows.append(held)
        at += size
    assert [len(held) for held in windows] == [2, 2, 1]
    assert set().union(*windows) == set(files)


@pytest.mark.parametrize("rule", [parse_rule(64), Pack(4800)], ids=["plain", "packed"])
def test_a_plan_takes_few_bytes_a_row(rule):
    sets = [DatasetRows("a", {"9x64x64": BucketRows(GRIDS["9x64x64"], np.full(10_000, 100, np.int64))})]
    tracemalloc.start()
    assert Order(sets, rule, epochs=3).batch(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 1_000_000  # 4 are row numbers


def test_keep_takes_the_same_number_of_rows_each_epoch_and_others():
    order = Order([dataset(short=[100])], parse_rule({"9x64x64": (10, 0.3)}), epochs=2)
    assert order.total() == 6
    epochs = [
        {row for step in range(3 * epoch, 3 * epoch + 3) for _, row in members(order.batch(step).content)}
        for epoch in (0, 1)
    ]
    assert [len(rows) for rows in epochs] == [30, 30]
    assert epochs[0] != epochs[1]


def test_numbers_of_numpy_are_the_same_order_as_those_of_python():
    sets, eight = [dataset(short=[20, 30])], np.int64(8)
    one = Order(sets, parse_rule(eight), seed=np.int64(5), epochs=np.int64(2))
    two = Order(sets, parse_rule(8), seed=5, epochs=2)
    assert one.total() == two.total() == 12
    assert [members(one.batch(s).content) for s in range(12)] == [members(two.batch(s).content) for s in range(12)]
    assert repr(Tokens(np.int64(96), multiple=np.int16(2))) == repr(Tokens(96, multiple=2))
    with pytest.raises(TypeError, match="key_of: expected str and int, got int64"):
        key_of(np.int64(5))


# ---- mixtures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_every_stretch_of_steps_is_close_to_the_weights(values):
    mixture = Mixture([None] * len(values), [Weights(0, tuple(map(float, values)))])
    chosen = [mixture.locate(step)[0] for step in range(600)]
    for start in (0, 137, 300):
        for number, value in enumerate(values):
            share = chosen[start : start + 300].count(number) / 300
            assert abs(share - value / sum(values)) < 0.03


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(1, 40_000)), min_size=1, max_size=4),
    st.lists(st.integers(0, 50_000), max_size=3, unique=True),
    st.data(),
)
def test_a_step_found_alone_is_the_step_found_in_turn(lengths, changes, data):
    weight = st.tuples(*[st.floats(0.1, 5) for _ in lengths])
    weights = [Weights(at, data.draw(weight)) for at in sorted({0, *changes})]
    in_turn, counts = Mixture(lengths, weights), Counter()
    steps = 3000
    for step in range(steps):
        place = in_turn.locate(step)
        if place is None:
            assert all(length is not None for length in lengths)
            assert step == sum(lengths) == in_turn.total()
            return
        assert place[1] == counts[place[0]]
        counts[place[0]] += 1
    for step in (0, 1, 2999, 60_000):
        assert Mixture(lengths, weights).locate(step) == in_turn.locate(step)


def test_weights_changed_at_a_step_leave_the_steps_before_as_they_were():
    sets = [dataset("a", short=[400]), dataset("b", short=[400])]
    before = Order(sets, parse_rule(4), weights=[Weights(0, (1.0, 1.0))])
    after = Order(sets, parse_rule(4), weights=[Weights(0, (1.0, 1.0)), Weights(30, (1.0, 0.0))])
    assert [members(before.batch(s).content) for s in range(30)] == [members(after.batch(s).content) for s in range(30)]
    assert {after.batch(step).dataset for step in range(30, 90)} == {0}


def test_an_endless_dataset_that_loses_its_weight_leaves_a_length():
    """Alone it ends there; beside others they give what they have left."""
    for lengths, changes, total in (
        ([None], {0: (1,), 7: (1,)}, None),
        ([None, 10], {0: (1, 1), 4: (0, 1)}, 12),
        ([None, 10], {0: (1, 0), 7: (0, 1)}, 17),
        ([10, None], {0: (1, 0), 4: (1, 1)}, None),
        ([None, 3], {0: (1, 1), 100: (0, 1)}, 100),
    ):
        mixture = Mixture(lengths, [Weights(step, values) for step, values in changes.items()])
        assert mixture.total() == total
        if total is not None:
            assert mixture.locate(total - 1) is not None
            assert mixture.locate(total) is None


def test_image_steps_come_at_their_ratio():
    order = Order([dataset(images=[200], short=[200], long=[200])], parse_rule(4), image_ratio=0.25)
    steps = [order.batch(step).content.bucket for step in range(200)]
    assert abs(steps.count("1x64x64") / 200 - 0.25) < 0.02
    assert set(steps) == set(GRIDS)


def test_weights_that_change_after_the_end_are_refused():
    sets = [dataset("a", short=[24]), dataset("b", short=[24])]
    late, message = (
        [Weights(0, (1.0, 0.0)), Weights(10, (0.0, 1.0))],
        r"given all their epochs at step 6, before the weights of step 10 give one to dataset 1; change the weights by step 6",
    )
    with pytest.raises(ConfigError, match=message):
        Order(sets, parse_rule(4), epochs=1, weights=late)
    with pytest.raises(ConfigError, match=message):
        Order(sets, parse_rule(4), epochs=(1, None), weights=late).batch(0)
    in_time = Order(sets, parse_rule(4), epochs=1, weights=[late[0], Weights(6, (0.0, 1.0))])
    assert [in_time.batch(step).dataset for step in range(in_time.total())] == [0] * 6 + [1] * 6
    assert Order(sets, parse_rule(4), epochs=1, weights=[late[0], Weights(10, (1.0, 0.0))]).total() == 6


def test_datasets_of_images_and_of_videos_are_mixed_at_the_ratio():
    images, videos = dataset("images", images=[90]), dataset("videos", short=[60], long=[60])
    order = Order([images, videos, dataset("both", images=[60], short=[60])], parse_rule(4), image_ratio=0.25)
    steps = [order.batch(step) for step in range(400)]
    assert abs(sum(step.content.bucket == "1x64x64" for step in steps) / 400 - 0.25) < 0.02
    assert {step.dataset for step in steps} == {0, 1, 2}
    with pytest.raises(ConfigError, match=r"image_ratio: from step 0 on no dataset with images has a weight"):
        Order([images, videos], parse_rule(4), image_ratio=0.25, weights=[Weights(0, (0.0, 1.0))])


def test_a_dataset_without_weight_may_have_none_of_the_buckets():
    sets, rule = [dataset("a", images=[9]), dataset("b", short=[20])], parse_rule({"9x64x64": 4})
    assert Order(sets, rule, weights=[Weights(0, (0.0, 1.0))]).batch(3).dataset == 1
    message = (
        r"dataset a gives not one global batch; it has 1x64x64 \(9 rows, not named in batch\); give the size of a batch"
    )
    with pytest.raises(ConfigError, match=message):
        Order(sets, rule)


# ---- packing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rows, rows, st.integers(0, 3))
def test_packed_sequences_hold_whole_latents_within_their_length(short, long, seed):
    one, rule = dataset(short=short, long=long), Pack(200, sequences=1, window=32)
    if (order := order_or_none([one], rule, seed=seed, epochs=1)) is None:
        return
    seen = Counter()
    for step in range(order.total()):
        for sequence in order.batch(step).content:
            tokens = [tokens_of(GRIDS[bucket], rule.patch) for bucket in sequence.buckets]
            assert sum(tokens) == sequence.tokens <= 200
            seen.update(zip(sequence.buckets, sequence.rows.tolist(), strict=True))
    assert set(seen.values()) <= {1}
    assert len(seen) == sum(short) + sum(long)


def test_first_fit_takes_the_first_sequence_with_space():
    tokens = np.random.default_rng(3).choice([7, 16, 30, 48], 300).tolist()
    places, used = first_fit(tokens, 100)
    free = []
    for count, place in zip(tokens, places, strict=True):
        assert place == next((n for n, left in enumerate(free) if left >= count), len(free))
        free += [100] * (place == len(free))
        free[place] -= count
    assert used == [100 - left for left in free]


def test_packing_goes_no_further_than_a_step_needs(monkeypatch):
    packed = Counter()
    monkeypatch.setattr("pipeline.loader.packing.first_fit", lambda *args: packed.update("x") or first_fit(*args))
    order = Order([dataset(short=[100] * 400)], Pack(480, sequences=8, window=100), epochs=3)
    alone = order.batch(0)
    assert packed["x"] < 100
    assert Order([dataset(short=[100] * 400)], Pack(480, sequences=8, window=100)).batch(1300).epoch == 2
    assert order.total() == 3 * 500
    assert str(order.batch(0)) == str(alone)


PINNED = [
    [("1x64x64", 0), ("1x64x64", 3), ("1x64x64", 1), ("1x64x64", 2)],
    [("9x64x64", 3), ("9x64x64", 2), ("9x64x64", 1), ("9x64x64", 9)],
    [("9x64x64", 7), ("9x64x64", 4), ("9x64x64", 5), ("9x64x64", 0)],
]
PINNED_PERMUTATION = [6, 5, 7, 3, 2, 0, 4, 1]
PINNED_UNIFORM = [0.8566090088692109, 0.9489698030023879, 0.5971185486343263]
