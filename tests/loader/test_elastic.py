"""The same global batches on 1, 2, 4, 8 and 16 ranks, and across two changes of that number, whatever the options."""

from __future__ import annotations

import json
from itertools import islice

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.loader import LatentDataset, LatentLoader, Pack, Prefix, Tokens

WORLDS = (1, 2, 4, 8, 16)
STEPS = 5  # on each world

rules = st.sampled_from(
    [16, {"9x32x24": 32, "9x32x40": (16, 0.5)}, Tokens(400, multiple=16), Pack(60, sequences=16, window=24)]
)
filters = st.sampled_from(
    [None, "num_frames > 1", "metadata.nested.score > 0 and caption like '%1%' or num_frames > 1"]
)
mixtures = st.sampled_from([None, {0: (1, 1)}, {0: (3, 1), 4: (1, 2), 11: (0, 1)}])


@settings(max_examples=12, deadline=None)
@given(
    rules,
    st.lists(filters, min_size=1, max_size=2, unique=True),
    mixtures,
    st.sampled_from(["none", "full", "window:1", "window:2"]),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([None, 0.25]),
    st.lists(st.sampled_from(WORLDS), min_size=3, max_size=3),
    st.integers(0, 40),
)
@example(16, [None, "num_frames > 1"], {0: (1, 1)}, "window:2", 1, False, 0.25, [4, 1, 2], 3)
def test_batches_do_not_depend_on_the_ranks_nor_on_changes_of_their_number(
    films, rule, wheres, weights, shuffle, seed, cropped, image_ratio, worlds, start
):
    """Every rank of every world opens the datasets anew and knows nothing but the state of any one rank before it."""
    even = len(wheres) == 1 or weights in (None, {0: (1, 1)})
    options = {
        "batch": rule,
        "weights": weights if len(wheres) == 2 else None,
        "shuffle": shuffle,
        "seed": seed,
        "crop": Prefix(2) if cropped and not isinstance(rule, dict) else None,
        "drop_last": False,
        # where images have a weight at every step
        "image_ratio": image_ratio if None in wheres and even and not isinstance(rule, dict) else None,
    }
    datasets = [LatentDataset.open(films["parquet"].uri, where=where) for where in wheres]

    def loader(rank=0, world=1):
        return LatentLoader(datasets, dp_rank=rank, dp_world=world, prefetch=1, threads=1, **options)

    alone = loader()
    expected = [alone.peek(step) for step in range(start, start + STEPS * len(worlds))]
    assert all(expected)
    first = loader()
    first.seek(start)
    state, found = first.state_dict(), []
    for world in worlds:
        ranks = [loader(rank, world) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
        shares = [[rank.peek(rank.step + step) for step in range(STEPS)] for rank in ranks]
        found += [[name for share in step for name in share] for step in zip(*shares, strict=True)]
        for rank in ranks:
            rank.skip(STEPS)
        states = [rank.state_dict() for rank in ranks]
        assert all(other == states[0] for other in states)
        state = states[-1]
    assert found == expected


def test_what_is_read_is_what_was_looked_at_also_after_a_change_of_ranks(films):
    datasets = [LatentDataset.open(films["tar"].uri), LatentDataset.open(films["tar"].uri, where="num_frames > 1")]
    options = {"batch": 8, "weights": {0: (1, 2), 3: (2, 1)}, "drop_last": False}
    expected = [LatentLoader(datasets, **options).peek(step) for step in range(9)]
    found, state = [], LatentLoader(datasets, **options).state_dict()
    for world in (2, 8, 4):
        ranks = [LatentLoader(datasets, dp_rank=rank, dp_world=world, **options) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(state)
        batches = [list(islice(rank, 3)) for rank in ranks]
        for step in zip(*batches, strict=True):
            found.append([name for batch in step for name in batch.ids])
            assert len({(batch.bucket, batch.latents.shape, batch.dataset, batch.step) for batch in step}) == 1
        state = ranks[0].state_dict()
    assert found == expected
