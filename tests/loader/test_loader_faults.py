"""What the loader does when rows are taken down, bytes are damaged, a store fails, or the options do not fit."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.config import WriteConfig
from pipeline.errors import ConfigError, InputError
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import LatentDataset, LatentLoader, Pack, Prefix, TensorCache, Window
from pipeline.loader.captions import CaptionRule
from tests.loader.outputs import SHORT, WHOLE, clip_of, mixed_shards, write_output
from tests.pipeline.latent_clips import values_of


def flip_a_byte(output, name):
    """Damages one latent in its file. Returns the key of the file."""
    dataset = LatentDataset.open(output.uri)
    for number in range(len(dataset.files)):
        index = dataset.indexes.get(number)
        if (row := index.find(name)) is not None:
            key = dataset.files.value("key", number)
            data = bytearray(output.store.read(key))
            data[index.offset(row)] ^= 1
            output.store.write(key, bytes(data))
            return key
    raise AssertionError(name)


# ---- takedowns ---------------------------------------------------------------------------------------------------------


def test_a_row_taken_down_during_a_run_is_replaced_by_one_of_its_bucket(tmp_path):
    output = write_output(tmp_path / "out", tmp_path, mixed_shards())
    before = [batch.ids for batch in LatentLoader(LatentDataset.open(output.uri), batch=3, epochs=2)]
    loader = LatentLoader(LatentDataset.open(output.uri), batch=3, epochs=2, prefetch=6)
    first = next(iter(loader))
    gone = before[5][1]
    assert gone in loader._ahead._ahead[4][1].result().ids  # was read ahead
    record_takedown(output.store, "asked", ids=[gone])
    loader.look_for_takedowns()
    after = [first.ids, *(batch.ids for batch in loader)]
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert all(b[i] == name for a, b in changed for i, name in enumerate(a) if name != gone)
    assert len(changed) == sum(gone in ids for ids in before) == loader.stats()["taken_down"]
    buckets = {name: clip.plan.bucket for name, clip in output.clips.items()}
    assert {buckets[name] for ids in after for name in ids if ids in [b for _, b in changed]} == {buckets[gone]}
    assert gone not in {name for ids in after for name in ids}
    again = LatentLoader(LatentDataset.open(output.uri), batch=3, epochs=2)
    assert [batch.ids for batch in again] == after  # the same draw on every machine
    ranks = [LatentLoader(LatentDataset.open(output.uri), batch=3, dp_rank=r, dp_world=3) for r in range(3)]
    assert [name for rank in ranks for name in rank.peek(5)] == after[5]


def test_a_bucket_of_which_all_rows_were_taken_down_ends_the_run(tmp_path):
    output = write_output(tmp_path / "out", tmp_path, [[clip_of(n, SHORT) for n in range(4)]])
    loader = LatentLoader(LatentDataset.open(output.uri), batch=2)
    record_takedown(output.store, "asked", sources=["s3://corpus/shard-000.tar"])
    loader.look_for_takedowns()
    with pytest.raises(InputError, match=r"bucket 9x32x24 of .* has no row left to read"):
        list(islice(loader, 9))


# ---- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [WriteConfig(), WriteConfig(format="tar", moments=True)], ids=["parquet", "tar"])
def test_a_damaged_latent_stops_the_run_or_is_replaced_and_named(tmp_path, config):
    output = write_output(tmp_path / "out", tmp_path, mixed_shards(moments=config.moments), config)
    before = [batch.ids for batch in LatentLoader(LatentDataset.open(output.uri), batch=3, epochs=1)]
    bad = before[4][2]
    key = flip_a_byte(output, bad)
    options = {"batch": 3, "epochs": 1}
    stopping = LatentLoader(LatentDataset.open(output.uri), verify="always", **options)
    with pytest.raises(InputError, match=rf"{key} bytes \d+ to \d+: the latent of {bad} is damaged: its hash is"):
        list(stopping)
    assert stopping.step == 4
    loader = LatentLoader(LatentDataset.open(output.uri), on_damage="replace", **options)
    batches = list(loader)
    changed = [(a, b.ids) for a, b in zip(before, batches, strict=True) if a != b.ids]
    assert [a for a, _ in changed] == [before[4]]
    assert changed[0][1][:2] == before[4][:2]
    for batch in batches:
        for value, name in zip(batch.latents, batch.ids, strict=True):
            clip = output.clips[name]
            assert str(clip.plan.bucket) == batch.bucket
            assert np.array_equal(value.float().numpy(), values_of(clip.latent_CTHW, "float16"))
    stats = loader.stats()
    assert (stats["damaged"], len(stats["damage"])) == (1, 1)
    assert key in stats["damage"][0]


def test_a_file_that_was_cut_off_is_damage(tmp_path):
    output = write_output(
        tmp_path / "out", tmp_path, [[clip_of(100 * s + n, SHORT) for n in range(4)] for s in range(2)]
    )
    key = LatentDataset.open(output.uri).files.value("key", 1)
    output.store.write(key, output.store.read(key)[:900])
    with pytest.raises(InputError, match=rf"{key} bytes .*: the file ends before the latent of"):
        list(LatentLoader(LatentDataset.open(output.uri), batch=4, epochs=1))
    loader = LatentLoader(LatentDataset.open(output.uri), batch=4, epochs=1, on_damage="replace")
    assert len(list(loader)) == 2
    assert loader.stats()["damaged"] > 0


def test_an_index_that_is_not_the_published_one_ends_the_run(tmp_path):
    output = write_output(tmp_path / "out", tmp_path, mixed_shards(1))
    key = LatentDataset.open(output.uri).files.value("index_key", 1)
    output.store.write(key, output.store.read(key)[:-1])
    with pytest.raises(InputError, match=rf"{key} is not the index that was recorded: sha256"):
        list(LatentLoader(LatentDataset.open(output.uri), batch=4, epochs=1))


# ---- S3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_latents_on_s3_are_read_by_ranges_checked_and_kept(s3, tmp_path):
    output = write_output(f"{s3.root}/out", tmp_path, mixed_shards(1), storage=s3.config())
    flip_a_byte(output, "video00005-0000")
    cache = TensorCache(tmp_path / "cache", "10MB")

    def loader(**options):
        dataset = LatentDataset.open(output.uri, storage=s3.config(), columns=("metadata",))
        return LatentLoader(dataset, batch=2, epochs=2, cache=cache, **options)

    with pytest.raises(InputError, match=r"s3://.* bytes \d+ to \d+: the latent of video00005-0000 is damaged"):
        list(loader())
    replacing = loader(on_damage="replace", seed=1)
    for batch in replacing:
        for value, name, metadata in zip(batch.latents, batch.ids, batch.metadata, strict=True):
            assert np.array_equal(value.float().numpy(), values_of(output.clips[name].latent_CTHW, "float16"))
            assert metadata == output.clips[name].sample.metadata
    stats = replacing.stats()
    assert stats["cache_hits"] > stats["tensors"] > 0
    assert stats["damaged"] == 2


# ---- crops -------------------------------------------------------------------------------------------------------------


def test_a_prefix_gives_the_first_frames_of_all_that_are_long_enough(tmp_path):
    lengths = [9, 13, 17, 9, 21, 13, 5, 5]
    shard = [clip_of(n, WHOLE, frames, moments=True) for n, frames in enumerate(lengths)]
    output = write_output(tmp_path / "out", tmp_path, [shard], WriteConfig(moments=True))
    loader = LatentLoader(LatentDataset.open(output.uri), batch=2, epochs=1, crop=Prefix(3))
    batches = list(loader)
    assert sorted(batch.bucket for batch in batches) == ["5x32x24", "9x32x24", "9x32x24", "9x32x24"]
    for batch in batches:
        frames = 3 if batch.bucket == "9x32x24" else 2
        assert batch.latents.shape == (2, 4, frames, 4, 3)
        assert batch.num_frames.tolist() == [4 * frames - 3] * 2
        for value, name in zip(batch.latents, batch.ids, strict=True):
            whole = values_of(output.clips[name].latent_CTHW, "float16")
            assert np.array_equal(value.float().numpy(), whole[:, :frames])
    packed = next(iter(LatentLoader(LatentDataset.open(output.uri), batch=Pack(36), crop=Prefix(3))))
    assert {latent.shape[1] for latent in packed.latents} <= {2, 3}
    sampled = LatentLoader(LatentDataset.open(output.uri), batch=2, crop=Prefix(3), posterior="sample", epochs=1)
    assert sum(len(batch) for batch in sampled) == 8
    flip_a_byte(output, "video00004-0000")
    replacing = LatentLoader(LatentDataset.open(output.uri), batch=2, epochs=1, crop=Prefix(3), on_damage="replace")
    assert all("video00004-0000" not in batch.ids for batch in replacing)
    assert replacing.stats()["damaged"] == 1


# ---- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("parquet", {"posterior": "sample"}, r'posterior: .* stores means only, "sample" needs the log-variance'),
        ("parquet", {"normalize": "unit"}, r"normalize: expected none or model, got 'unit'"),
        ("parquet", {"posterior": "mode"}, r"posterior: expected mean or sample"),
        (
            "parquet",
            {"batch": 6, "dp_world": 4},
            r"6 latents, which 4 ranks cannot share equally.*divide 6: 1, 2, 3, 6",
        ),
        (
            "parquet",
            {"batch": {"9x32x40": 64}},
            r"gives not one global batch; it has .*9x32x40 \(15 rows, batch of 64\); lower the batch size to at most 15,",
        ),
        ("parquet", {"dp_rank": 2, "dp_world": 2}, r"dp_rank: expected 0 to 1 for dp_world 2, got 2"),
        ("parquet", {"prefetch": 0}, r"prefetch: expected a whole number >= 1, got 0"),
        ("parquet", {"threads": 2.5}, r"threads: expected a whole number >= 1, got 2.5"),
        ("parquet", {"dp_rank": 0.0}, r"dp_rank: expected a whole number, got 0.0"),
        ("parquet", {"dp_world": 0}, r"dp_world: expected a whole number >= 1, got 0"),
        ("parquet", {"cache": "/tmp/copies"}, r'cache: expected TensorCache\(folder, "200GB"\), got'),
        ("parquet", {"dtype": "bfloat16"}, r"dtype: expected a floating-point torch.dtype .*, got 'bfloat16'"),
        ("parquet", {"device": "gpu"}, r"device: 'gpu' cannot be used: .*; expected cpu or cuda:N"),
        ("parquet", {"device": "cuda:99"}, r"device: 'cuda:99' cannot be used: .*; expected cpu or cuda:N"),
        ("parquet", {"allow_fingerprints": None}, r"allow_fingerprints: expected a list of strings, got None"),
        ("parquet", {"captions": 3}, r"captions: expected a list of strings, got 3"),
        ("parquet", {"weights": 5}, r"weights: expected a number for each dataset, or \{step: numbers\}, got 5"),
        ("parquet", {"weights": "x"}, r"weights: expected a number >= 0, got 'x'"),
        ("parquet", {"takedowns_every_s": "x"}, r"takedowns_every_s: expected a number >= 0, got 'x'"),
        ("parquet", {"verify": "never", "on_damage": "replace"}, r"on_damage: replace .* verify cannot be never"),
        ("parquet", {"verify": "sometimes"}, r"verify: expected auto or always or never, got 'sometimes'"),
        ("parquet", {"on_damage": "ignore"}, r"on_damage: expected stop or replace"),
        (
            "parquet",
            {"crop": Window(2)},
            r"crop: a latent frame of tiny depends on an unknown number of earlier frames",
        ),
        ("parquet", {"crop": 3}, r"crop: expected Prefix\(T\)"),
        (
            "parquet",
            {"captions": ("text",)},
            r'captions: expected "caption", "captions", "captions.NAME" or "metadata.KEY"',
        ),
        ("parquet", {"caption_dropout": 1.5}, r"caption_dropout: expected a number from 0 to 1, got 1.5"),
        ("parquet", {"peers": 3}, r"peers: expected a group of torch.distributed that has this rank, got 3"),
        ("parquet", {"weights": (1, 2)}, r"weights: expected 1, one for each dataset, got 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(films, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        LatentLoader(LatentDataset.open(films[kind].uri), **{"batch": 2, **options})


def test_what_is_not_a_dataset_is_refused(films):
    dataset = LatentDataset.open(films["parquet"].uri)
    for given in ("out", None, dataset.as_map_dataset(), [dataset, "out"]):
        with pytest.raises(
            ConfigError, match=r"datasets: expected a LatentDataset or a list of them, LatentDataset.open\("
        ):
            LatentLoader(given, batch=2)


@pytest.mark.parametrize("frames", [0, "2", 1.5, True])
def test_crops_have_whole_frames(frames):
    for crop in (Prefix, Window):
        with pytest.raises(ConfigError, match=rf"crop: {crop.__name__}: expected a whole number >= 1, got {frames!r}"):
            crop(frames)
    assert repr(Prefix(np.int64(2))) == "Prefix(frames=2)"


def with_spec(films, **changes):
    """A dataset whose files describe another network."""
    from dataclasses import replace

    dataset = LatentDataset.open(films["parquet"].uri)
    dataset.spec = replace(dataset.spec, **changes)
    return dataset


def test_values_are_not_normalised_twice_nor_without_constants(films):
    with pytest.raises(ConfigError, match="were normalised before they were stored"):
        LatentLoader(with_spec(films, normalised=True), batch=2, normalize="model")
    with pytest.raises(ConfigError, match=r"records no constants of tiny; use normalize=\"none\""):
        LatentLoader(with_spec(films, scale=None, shift=None), batch=2, normalize="model")
    mean_std = with_spec(films, scale=None, shift=None, mean=(0.0, 1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0, 8.0))
    raw = next(iter(LatentLoader(mean_std, batch=2)))
    batch = next(iter(LatentLoader(mean_std, batch=2, normalize="model", dtype=torch.float32)))
    mean, std = torch.tensor([[0.0, 1, 2, 3], [1, 2, 4, 8]]).reshape(2, 1, 4, 1, 1, 1)
    assert torch.equal(batch.latents, (raw.latents.float() - mean) / std)


def test_crops_follow_from_what_the_network_allows(films):
    with pytest.raises(ConfigError, match=r"crop: tiny is not causal"):
        LatentLoader(with_spec(films, causal=False), batch=2, crop=Prefix(2))
    rule = {"5x32x24": 4}
    loader = LatentLoader(with_spec(films, context_frames=0), batch=rule, crop=Window(2), epochs=3)
    starts = set()
    for batch in loader:
        for value, name in zip(batch.latents, batch.ids, strict=True):
            whole = values_of(films["parquet"].clips[name].latent_CTHW, "float16")
            (start,) = [s for s in range(2) if np.array_equal(value.float().numpy(), whole[:, s : s + 2])]
            starts.add((name, start))
    assert {start for _, start in starts} == {0, 1}
    assert len({name for name, _ in starts}) < len(starts)  # another one in another epoch


def test_datasets_that_mean_something_else_are_not_mixed(films, tmp_path):
    one, other = (LatentDataset.open(films[name].uri) for name in ("parquet", "moments"))
    with pytest.raises(ConfigError, match=r"differ in dtype 'float16' and 'bfloat16', moments False and True"):
        LatentLoader([one, other], batch=2)
    with pytest.raises(ConfigError, match="datasets: expected at least one"):
        LatentLoader([], batch=2)
    foreign = with_spec(films, fingerprint="b" * 32)
    with pytest.raises(
        ConfigError, match=r"fingerprints differ \(bbbbbbbb, f0e1d2c3\).*allow_fingerprints=\['bbbbbbbb', 'f0e1d2c3'\]"
    ):
        LatentLoader([one, foreign], batch=2)
    foreign.identity = "foreign"
    assert LatentLoader([one, foreign], batch=2, allow_fingerprints=["bbbb", "f0e1"]).peek(0)


# ---- captions ----------------------------------------------------------------------------------------------------------


def test_one_of_several_captions_is_drawn_anew_in_each_epoch(tmp_path):
    metadata = [{"short": f"s{n}", "all": [f"a{n}", f"b{n}"]} for n in range(8)]
    shard = [clip_of(n, SHORT, metadata=metadata[n]) for n in range(8)]
    output = write_output(tmp_path / "out", tmp_path, [shard])

    def captions(**options):
        found = {}
        loader = LatentLoader(LatentDataset.open(output.uri), batch=4, epochs=12, **options)
        for batch in loader:
            assert batch.metadata == []
            for name, caption in zip(batch.ids, batch.captions, strict=True):
                found.setdefault(int(name[5:10]), []).append(caption)
        return found

    chosen = captions(captions=("caption", "metadata.short", "metadata.all"))
    assert chosen == captions(captions=("caption", "metadata.short", "metadata.all"), seed=0)
    for n, texts in chosen.items():
        assert set(texts) <= {f"Ein Café, {n}", f"s{n}", f"a{n}", f"b{n}"}
    assert sum(len(set(texts)) for texts in chosen.values()) > 20
    dropped = [text for texts in captions(caption_dropout=0.25).values() for text in texts]
    assert 10 <= dropped.count("") <= 38  # of 96
    assert captions(captions=("metadata.nothing",)) == {n: [""] * 12 for n in range(8)}


@pytest.mark.parametrize("container", ["parquet", "tar"])
def test_captions_of_a_row_are_drawn_by_name_or_among_all(tmp_path, container):
    named = [(("txt", f"t{n}"), ("short", f"s{n}"), ("short", f"r{n}"))[: 3 if n else 1] for n in range(4)]
    shard = [clip_of(n, SHORT, caption=f"t{n}", captions=named[n]) for n in range(4)]
    output = write_output(tmp_path / "out", tmp_path, [shard], WriteConfig(format=container))

    def drawn(source):
        found = [set() for _ in named]
        with LatentLoader(LatentDataset.open(output.uri), batch=4, epochs=16, captions=source) as loader:
            for batch in loader:
                assert batch.columns == {}
                for name, caption in zip(batch.ids, batch.captions, strict=True):
                    found[int(name[5:10])].add(caption)
        return found

    assert drawn("captions") == [{text for _, text in each} for each in named]
    assert drawn("captions.short") == [{""}, *({f"s{n}", f"r{n}"} for n in (1, 2, 3))]
    row = next(LatentDataset.open(output.uri, columns=("captions", "caption_names")).rows())
    assert row.columns == {"captions": ["t0"], "caption_names": ["txt"]}
    twice = {"captions": ["t", "t", "l"], "caption_names": ["txt", "short", "long"]}
    assert CaptionRule(("captions",)).candidates("t", twice) == ["t", "l"]
    assert CaptionRule(("captions.short",)).candidates("t", twice) == ["t"]


def test_the_state_is_small(films):
    datasets = [LatentDataset.open(films["parquet"].uri, where=where) for where in (None, "num_frames > 1")]
    state = LatentLoader(datasets, batch=2, weights=(1, 2)).state_dict()
    assert len(json.dumps(state)) < 600
