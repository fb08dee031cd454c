"""Variants of clips in the loader: all, one by name, or one drawn in each epoch; the same on any number of ranks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DrillConfig, WriteConfig
from pipeline.errors import ConfigError, InputError
from pipeline.format.layout import CURRENT
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import LatentDataset, LatentLoader, Pack, Prefix, Tokens
from pipeline.loader.file_index import IndexCache
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.verify import verify_output
from pipeline.records import LatentClip, split_id
from pipeline.writer import ShardWriter
from tests.loader.outputs import IMAGE, SHORT, WHOLE, WIDE, Output, clip_of
from tests.pipeline.latent_clips import (
    FINGERPRINT,
    METADATA,
    PARTS,
    bits_of,
    latent_values,
    local_store,
    receipt_of,
    shard_of,
)

VARIANTS = ("crop1", "crop2", "crop1-flip", "crop2-flip")
SHAPES = [*[(IMAGE, 1)] * 4, *[(SHORT, 9)] * 6, *[(WIDE, 9)] * 5, (WHOLE, 9), (WHOLE, 17), (WHOLE, 17), (WHOLE, 9)]
CLIPS = 2 * len(SHAPES)


def variants_of(seed: int, bucket, frames: int) -> list[LatentClip]:
    made = clip_of(seed, bucket, frames)
    return [
        replace(
            made,
            id=f"{made.id}-{name}",
            plan=replace(made.plan, index=n, variant=name, variants=len(VARIANTS)),
            latent_CTHW=bits_of(latent_values(1000 * n + seed, frames, bucket), "float16"),
        )
        for n, name in enumerate(VARIANTS)
    ]


def write(root, spool, groups: list[list[list[LatentClip]]], *, container: str = "parquet") -> Output:
    """Shards of groups of rows that are written together."""
    parts = {**PARTS, "variant": ",".join(VARIANTS)}
    store = local_store(root)
    Ledger(store).prepare("variants")
    for number, clips in enumerate(groups):
        with ShardWriter(
            store,
            spool,
            WriteConfig(format=container, row_group_bytes=64 * 1024),
            shard_id=shard_of(number).id(FINGERPRINT),
            attempt="a1",
            fingerprint=FINGERPRINT,
            metadata={**METADATA, "fingerprint_parts": parts},
            layout=CURRENT,
            drill=DrillConfig(),
        ) as writer:
            for variants in clips:
                writer.add(*variants)
            files, stats = writer.finish()
        Ledger(store).commit(replace(receipt_of(files, stats, shard=number), fingerprint_parts=parts))
    publish(store, PublishOptions(delta=False))
    return Output(store, {clip.id: clip for clips in groups for group in clips for clip in group})


def both_shards() -> list[list[list[LatentClip]]]:
    return [[variants_of(100 * shard + n, *shape) for n, shape in enumerate(SHAPES)] for shard in range(2)]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Output:
    folder = tmp_path_factory.mktemp("variants")
    return write(folder / "out", folder / "spool", both_shards())


def ids(loader: LatentLoader, steps: int) -> list[str]:
    return [name for step in range(steps) for name in loader.peek(step)]


def loader_of(output: Output, *, where: str | None = None, **options) -> LatentLoader:
    dataset = LatentDataset.open(output.uri, where=where)
    return LatentLoader(dataset, **{"batch": 1, "epochs": 1, "threads": 1, "prefetch": 1, **options})


# --- which rows -------------------------------------------------------------------------------------------------------


def test_all_variants_are_rows_unless_one_is_chosen(output):
    loader = loader_of(output)
    assert sorted(ids(loader, len(loader))) == sorted(output.clips)
    for name in VARIANTS:
        one = loader_of(output, variants=name)
        assert sorted(ids(one, len(one))) == sorted(each for each in output.clips if split_id(each)[1] == name)


def test_each_epoch_draws_one_variant_of_each_clip_anew(output):
    loader = loader_of(output, variants="draw", epochs=40)
    assert len(loader) == 40 * CLIPS
    drawn = defaultdict(list)
    for epoch in range(40):
        names = [name for step in range(CLIPS) for name in loader.peek(epoch * CLIPS + step)]
        assert len({split_id(name)[0] for name in names}) == CLIPS
        for name in names:
            drawn[split_id(name)[0]].append(split_id(name)[1])
    assert all(set(found) == set(VARIANTS) for found in drawn.values())
    counts = Counter(name for found in drawn.values() for name in found)
    fair = 40 * CLIPS / 4
    assert all(abs(counts[name] - fair) < 6 * fair**0.5 for name in VARIANTS)
    assert len({tuple(found) for found in drawn.values()}) == CLIPS  # clips are drawn apart


def test_the_drawn_variant_is_what_is_read(output):
    loader = loader_of(output, variants="draw", batch=4, drop_last=False, small_buckets="drop")
    for batch in islice(loader, 6):
        for name, latent in zip(batch.ids, batch.latents, strict=True):
            assert np.array_equal(latent.numpy(), output.clips[name].latent_CTHW)


def test_a_filter_leaves_the_draw_what_it_leaves(output):
    where = "variant != 'crop1' and not (variant like '%flip' and num_frames > 1)"
    loader = loader_of(output, where=where, variants="draw", epochs=12)
    found = defaultdict(set)
    for name in ids(loader, len(loader)):
        found[split_id(name)[0]].add(split_id(name)[1])
    assert len(found) == CLIPS
    images = {split_id(name)[0] for name, clip in output.clips.items() if clip.num_frames == 1}
    assert all(
        found[stem] == ({"crop2", "crop1-flip", "crop2-flip"} if stem in images else {"crop2"}) for stem in found
    )
    one = loader_of(output, where=where, variants="crop1-flip")
    assert {split_id(name)[0] for name in ids(one, len(one))} == images


def test_an_output_without_variants_has_base_alone(films):
    plain = loader_of(films["parquet"])
    for variants in ("draw", "base"):
        assert ids(loader_of(films["parquet"], variants=variants), 20) == ids(plain, 20)
    with pytest.raises(ConfigError, match=r"variants: expected all, draw or one of base for .*, got 'flip'"):
        loader_of(films["parquet"], variants="flip")


@pytest.mark.parametrize("variants", ["base", "Draw", 3, None, ("crop1",)])
def test_a_variant_that_the_output_does_not_have_is_refused(output, variants):
    with pytest.raises(ConfigError, match="expected all, draw or one of crop1, crop2, crop1-flip, crop2-flip for "):
        loader_of(output, variants=variants)


# --- order and state --------------------------------------------------------------------------------------------------

WORLDS = (1, 2, 4, 8)
STEPS = 4
rules = st.sampled_from(
    [8, {"9x32x24": 16, "9x32x40": (8, 0.5)}, Tokens(200, multiple=8), Pack(60, sequences=8, window=24)]
)


@settings(max_examples=8, deadline=None)
@given(
    rules,
    st.sampled_from(["draw", "crop2", "all"]),
    st.sampled_from([None, "num_frames > 1", "variant != 'crop1' or caption like '%1%'"]),
    st.booleans(),
    st.integers(0, 2),
    st.lists(st.sampled_from(WORLDS), min_size=2, max_size=2),
    st.integers(0, 30),
)
def test_draws_do_not_depend_on_the_ranks_nor_on_changes_of_their_number(
    output, rule, variants, where, cropped, seed, worlds, start
):
    options = {"batch": rule, "seed": seed, "variants": variants, "epochs": None, "where": where, "drop_last": False}
    options["crop"] = Prefix(2) if cropped and not isinstance(rule, dict) else None
    alone = loader_of(output, **options)
    expected = [alone.peek(step) for step in range(start, start + STEPS * len(worlds))]
    assert all(expected)
    alone.seek(start)
    state, found = alone.state_dict(), []
    for world in worlds:
        ranks = [loader_of(output, dp_rank=rank, dp_world=world, **options) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
        shares = [[rank.peek(rank.step + step) for step in range(STEPS)] for rank in ranks]
        found += [[name for share in step for name in share] for step in zip(*shares, strict=True)]
        ranks[-1].skip(STEPS)
        state = ranks[-1].state_dict()
    assert found == expected


def test_a_state_of_other_variants_is_refused_and_an_older_one_is_of_all(output):
    state = loader_of(output, variants="draw").state_dict()
    with pytest.raises(ConfigError, match="state: variants was 'draw', this loader has 'all'"):
        loader_of(output).load_state_dict(state)
    older = loader_of(output).state_dict()
    del older["order"]["variants"]
    loader_of(output).load_state_dict(older)
    with pytest.raises(ConfigError, match="state: variants was 'all', this loader has 'crop1'"):
        loader_of(output, variants="crop1").load_state_dict(older)
    assert loader_of(output).order_digest != loader_of(output, variants="draw").order_digest


def test_no_index_is_read_to_find_the_variants(output, monkeypatch):
    dataset = LatentDataset.open(output.uri)

    def refused(self, number, names):
        raise AssertionError(f"the index of file {number} was read")

    monkeypatch.setattr(IndexCache, "columns", refused)
    assert len(LatentLoader(dataset, batch=1, epochs=1, variants="draw")) == CLIPS
    assert len(LatentLoader(dataset, batch=1, epochs=1, variants="crop2")) == CLIPS


# --- rows that go, rows out of place ----------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["parquet", "tar"])
def test_clips_that_are_taken_down_are_replaced_by_others_and_gone_after_publishing(tmp_path, container):
    output = write(tmp_path / "out", tmp_path / "spool", both_shards(), container=container)
    before = loader_of(output, variants="draw")
    gone = split_id(ids(before, len(before))[0])[0]
    sample = output.clips[f"{gone}-crop1"].sample
    if container == "tar":
        record_takedown(output.store, "asked", samples=[(sample.uri, sample.key)])
    else:  # one row: the others show the same
        record_takedown(output.store, "asked", ids=[f"{gone}-crop2-flip"])
    before.look_for_takedowns()
    names = ids(before, len(before))
    assert len(names) == CLIPS
    assert gone not in {split_id(name)[0] for name in names}
    publish(output.store, PublishOptions(delta=False))
    for variants, rows in (("draw", CLIPS - 1), ("crop2", CLIPS - 1), ("all", 4 * CLIPS - 4)):
        after = loader_of(output, variants=variants)
        names = ids(after, len(after))
        assert len(set(names)) == len(names) == rows
        assert gone not in {split_id(name)[0] for name in names}
    compact(output.store, CompactOptions(delta=False))  # copies rows: what is left of a file stays in groups
    drawn = ids(loader_of(output, variants="draw"), CLIPS - 1)
    assert len({split_id(name)[0] for name in drawn}) == CLIPS - 1
    assert verify_output(output.store).ok


def test_rows_that_are_not_in_groups_are_refused_with_their_file(tmp_path):
    clips = [variants_of(n, SHORT, 9) for n in range(2)]
    apart = [[clip] for clip in (*clips[0][::-1], *clips[1])]
    apart = [[replace(clip, plan=replace(clip.plan, index=7 - clip.plan.index))] for (clip,) in apart]
    output = write(tmp_path / "apart", tmp_path / "spool", [apart])
    with pytest.raises(
        InputError, match=r"is variant crop2-flip, expected crop1 there: .*read it with variants=\"all\""
    ):
        ids(loader_of(output, variants="crop1"), 2)
    assert len(ids(loader_of(output), 8)) == 8
    output = write(tmp_path / "few", tmp_path / "spool", [[clips[0], clips[1][:3]]])
    with pytest.raises(InputError, match=r"has 7 rows, expected 4 for each clip .*see `lathe verify`"):
        loader_of(output, variants="draw")
