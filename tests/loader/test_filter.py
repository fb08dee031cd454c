"""Filters: SQL over rows and metadata, decided by the manifest where it can, refused where the order could not be repeated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import WriteConfig
from pipeline.errors import ConfigError
from pipeline.loader import file_index
from pipeline.loader import filter as filter_module
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.expression import Expression
from pipeline.loader.filter import filtered_rows
from pipeline.loader.ranges import Bounds, bounds_of_files
from pipeline.storage.local import LocalStore
from tests.loader.outputs import IMAGE, SHORT, WHOLE, WIDE, clip_of, write_output

METADATA = [
    {"tags": [], "score": 1, "box": {"w": 1}, "Kind": "upper", "big": 2**63 - 1, "mixed": 2**60 + 1},
    {"tags": ["x", "y"], "score": 2.5, "box": {"h": 2}, "kind": "lower", "big": 2**70, "mixed": 0.5},
    {"tags": None, "box": {"w": 3, "W": 4}, "kind": "lower", "big": -(2**65), "a b": 1, "huge": 10**40},
    {"score": 3, "objects": [{"name": "cat"}, {"name": "dog", "size": 1.5}], "kind": "Upper"},
]


def clip(number, bucket, frames=None, fps=8.0):
    made = clip_of(number, bucket, frames, metadata=METADATA[number % len(METADATA)])
    return replace(made, plan=replace(made.plan, fps=fps))


def shards():
    """Four shards of images, short and wide clips of several rates, and whole videos, of one length in every other shard."""
    for shard in range(4):
        buckets = [IMAGE, SHORT, WIDE] * 2
        made = [clip(100 * shard + n, bucket, fps=8.0 + n % 2 * shard) for n, bucket in enumerate(buckets)]
        lengths = (9, 9, 9) if shard % 2 else (5, 9, 13)
        yield made + [clip(100 * shard + 6 + n, WHOLE, frames) for n, frames in enumerate(lengths)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return write_output(folder / "out", folder, list(shards()))


@pytest.fixture(scope="module")
def dataset(films):
    return LatentDataset.open(films.uri)


@pytest.fixture
def reads(monkeypatch):
    """Files whose index or columns are read while a dataset is opened."""
    found = []
    for home, name, place in ((file_index.IndexCache, "columns", 1), (filter_module, "read_columns", 2)):
        original = getattr(home, name)

        def counted(*given, original=original, place=place):
            found.append(given[place])
            return original(*given)

        monkeypatch.setattr(home, name, counted)
    return found


def kept_of(dataset, where, bounds=None):
    return filtered_rows(dataset.store, dataset.files, dataset.indexes, bounds or dataset.bounds, where, 2)


def ids(dataset, where):
    found, kept = set(), kept_of(dataset, where)
    for number in range(len(dataset.files)):
        index = dataset.indexes.get(number)
        found |= {index.text("id", row) for row in kept.get(number, np.arange(len(index)))}
    return found


def clips_of(films, test):
    return {name for name, found in films.clips.items() if test(found)}


TESTS = [
    "num_frames > 5", "5 < num_frames", "num_frames = 9", "num_frames <> 9", "num_frames between 6 and 12", "num_frames in (1, 13, null)",
    "not (num_frames > 5)", "num_frames not in (1, 13)", "not (num_frames between 6 and 12)", "num_frames > null or fps <= 8",
    "fps > 8 and num_frames > 1", "fps >= 9 or num_frames = 5", "fps * num_frames > 80", "fps = num_frames",
    "num_frames % 2 = 1 and fps <> 9",
    "id >= 'video00200-0000'", "id = 'video00103-0000' or bucket = '1x32x24'", "id like '%3-0000'", "bucket = '9x32x24'",
    "bucket <> '9x32x24'", "bucket in ('9x32x24', 'v9x32x40')", "bucket not in ('vnx32x24', '1x32x24')", "width > 24", "width = height - 8",
    "case when num_frames > 9 then fps > 1 else width > 24 end", "not (fps > 8 and metadata.score > 2)",
    "num_frames = 5 or metadata.score > 2",
    "num_frames = 9 and metadata.score is null", "sqrt(num_frames) <= 3 and not bucket like '1x%'", "coalesce(null, num_frames > 9)",
    "num_frames::varchar = '13'",
    "(bucket = '9x32x24') = (fps > 8)", "not (bucket in ('5x32x24', 'v9x32x24'))", "(num_frames > 5) = (fps > 8)",
    "not (num_frames > null) or num_frames = 13", "fps not between 8.5 and 9",
]  # fmt: skip


@pytest.mark.parametrize("where", TESTS)
def test_what_the_manifest_decides_is_what_the_rows_say(dataset, where):
    unknown = {
        path: Bounds(pa.nulls(len(dataset.files), found.low.type), pa.nulls(len(dataset.files), found.high.type))
        for path, found in dataset.bounds.items()
    }
    by_rows, by_manifest = kept_of(dataset, where, unknown), kept_of(dataset, where)
    assert by_rows.keys() == by_manifest.keys()
    assert all(np.array_equal(by_rows[number], by_manifest[number]) for number in by_rows)


@pytest.mark.parametrize(
    ("where", "few"),
    [
        ("num_frames = 1 or width > 24", 0),
        ("bucket in ('1x32x24', 'v9x32x40')", 2),
        ("fps > 7 and fps < 12 and num_frames < 100", 0),
        ("id < 'video00100-0000'", 0),
        ("not (num_frames >= 5) and height * width = 768", 0),
        ("bucket like 'v%' and num_frames >= 13", 2),  # whole videos of several lengths
        ("num_frames = 1 and metadata.score > 2", 4),  # images, of four shards
    ],
)
def test_files_that_the_manifest_decides_are_not_read(dataset, reads, where, few):
    kept_of(dataset, where)
    assert len(set(reads)) == few


def test_what_the_manifest_does_not_say_of_a_file_is_null(dataset):
    texts = ['{"fps": [8, 9.5], "new": {"x": [1]}, "num_frames": [5, 5]}', "{}", '{"id": ["a\\n", "b"]}']
    table = dataset.files.table.slice(0, 3).drop_columns("ranges").append_column("ranges", pa.array(texts))
    found = bounds_of_files(replace(dataset.files, table=table))
    assert [(found[name,].low.to_pylist(), found[name,].high.to_pylist()) for name in ("fps", "num_frames", "id")] == [
        ([8.0, None, None], [9.5, None, None]),
        ([5, None, None], [5, None, None]),
        ([None, None, "a\n"], [None, None, "b"]),
    ]


def test_whole_videos_of_one_length_are_placed_without_their_indexes(films, reads):
    dataset = LatentDataset.open(films.uri)
    assert len(reads) == 2
    assert dataset.buckets == {"1x32x24": 8, "5x32x24": 2, "9x32x24": 16, "9x32x40": 8, "13x32x24": 2}
    frames = {row.id: f"{row.num_frames}x" for row in dataset.rows(tensors=False)}
    for name, bucket in dataset.places.items():
        numbers, positions = bucket.locate(np.arange(len(bucket)))
        held = [dataset.indexes.get(file).text("id", row) for file, row in zip(numbers, positions, strict=True)]
        assert all(name.startswith(frames[one]) for one in held)


@pytest.mark.parametrize(
    "where", ["bucket = '9x32x24'", "bucket in ('9x32x24')", "'9x32x24' = bucket", "BUCKET like '9x32x24'"]
)
def test_a_bucket_as_batches_spell_it_has_the_whole_videos_of_that_length(films, dataset, where):
    wanted = clips_of(films, lambda found: found.num_frames == 9 and found.plan.bucket.width == 24)
    assert ids(dataset, where) == wanted
    assert LatentDataset.open(films.uri, where=where).buckets == {"9x32x24": len(wanted)}


def test_a_bucket_as_files_spell_it_is_the_column(films, dataset):
    assert ids(dataset, "bucket = 'v9x32x24'") == clips_of(films, lambda found: found.plan.bucket == SHORT)
    whole = clips_of(films, lambda found: found.plan.bucket == WHOLE)
    assert (
        ids(dataset, "bucket = 'vnx32x24'")
        == ids(dataset, "bucket like 'vn%'")
        == ids(dataset, "bucket = 'nx32x24'")
        == whole
    )
    assert ids(dataset, "bucket like '%x24'") == clips_of(films, lambda found: found.plan.bucket.width == 24)


# ---- metadata ----------------------------------------------------------------------------------------------------------


def of(*numbers):
    return lambda found: found.sample.index % len(METADATA) in numbers


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("metadata.Kind = 'upper'", of(0)),
        ("metadata.kind = 'lower' or metadata.Kind = 'none'", of(1, 2)),
        ("metadata.kind is null", of(0)),
        ("list_contains(metadata.tags, 'x')", of(1)),
        ("len(metadata.tags) = 0", of(0)),
        ("len(list_filter(metadata.tags, x -> x = 'x')) > 0", of(1)),
        ("len(list_filter(metadata.tags, lambda x, i: x = 'y' and i = 2)) > 0", of(1)),
        ("len([t for t in metadata.tags if t <> 'x']) = 1", of(1)),
        ("len(list_filter(metadata.objects, o -> o.size > 1)) = 1", of(3)),
        ("metadata.objects[1].name = 'cat'", of(3)),
        ("metadata.box.w = 3 and metadata.box.W = 4", of(2)),
        ("metadata.big > 9223372036854775807", of(1)),
        ("metadata.big < -9223372036854775808", of(2)),
        ("metadata.mixed > 1", of(0)),
        ('metadata."a b" = 1', of(2)),
        ("metadata.score > 2 -- of one model\n and true", of(1, 3)),
        ("metadata.score > 2 -- at the end", of(1, 3)),
        ("metadata->>'$.kind' = 'Upper'", of(3)),
        ("metadata.score + 1 > 3 and year(date '2020-01-01') = 2020", of(1, 3)),
        ("metadata.nothing is null and metadata.score = 1", of(0)),
        ("coalesce(metadata.nothing, 5) > 4 and metadata.score = 1", of(0)),
        ("num_frames > 100 or metadata.score = 1", of(0)),
    ],
)
def test_keys_of_metadata(films, dataset, where, wanted):
    assert ids(dataset, where) == clips_of(films, wanted)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", r"where: expected an SQL expression, got ''; leave it out"),
        (" \n", r"leave it out"),
        (5, r"expected an SQL expression, got 5"),
        ("-- nothing", r"is not an SQL expression|expected an expression"),
        ("metadata['score'] > 1", r"write keys of metadata as metadata.KEY, here metadata.score"),
        ("(metadata).score > 1", r"write keys of metadata as metadata.KEY, here metadata.score"),
        ("current_date > '2020-01-01'", r"current_date gives other values at each call"),
        ("age(timestamp '2020-01-01') > interval 1 day", r"age\(\) gives other values"),
        ("current_user = 'x'", r"current_user(\(\))? gives other values"),
        ("pg_sleep(1) is null", r"pg_sleep\(\) gives other values"),
        ("metadata.nothing > 3 or num_frames > 1", r"no row has metadata.nothing; if only some outputs have it, write"),
        ("metadata.huge > 3", r"numbers of more than 38 digits; cast"),
        ("metadata.box.w > 3 and metadata.box is not null", r"metadata.box has keys that differ in case only \(w, ?W|\(w\)|\(W\)"),
        ("num_frames > 100", r"matches no row of .*, whose buckets are v1x32x24, v9x32x24, v9x32x40, vnx32x24"),
        ("bucket = '17x32x24'", r"matches no row of .*whose buckets are"),
        ("bucket = '32x24' or fps > 1", r"'32x24' is not the name of a bucket; expected FRAMESxHEIGHTxWIDTH"),
        ("bucket in ('9x32x24', 'small')", r"'small' is not the name of a bucket"),
        ("lower(bucket) = '9x32x24'", r"test bucket itself against '9x32x24', with =, <>, in or like"),
        ("bucket between '5x32x24' and '9x32x24'", r"test bucket itself"),
        ("list_contains(['9x32x24'], bucket)", r"test bucket itself"),
        ("lower(bucket) like '9x%' or fps > 1", r"test bucket itself"),
    ],
)  # fmt: skip
def test_what_a_filter_cannot_mean_is_refused(dataset, where, message):
    with pytest.raises(ConfigError, match=message):
        kept_of(dataset, where)


@pytest.mark.parametrize(
    "where",
    [
        "true) using sample 5 percent (bernoulli", "fps > 1 using sample 5", "true qualify row_number() over () < 3",
        "true) group by (all", "true group by all", "true having true", "columns(*) > 1", "* > 1", "#1 > 2", "fps > ?",
        "fps > 1, true", "fps > 1 as x", "x: fps > 1", "fps from rows", "distinct fps", "fps > 1 order by 1", "fps > 1 limit 3",
        "1; select 2", "exists (select 1)", "row_number() over () > 1", "fps > 1 union select true", "count(*) > 1", "max(fps) > 1",
        "true) or (true", "unnest([true, false])", "gen_random_uuid() is not null", "nextval('x') > 1", "getvariable('x') is null",
        "list_sum(list_transform([1], x -> random())) > 1", "current_setting('threads') = '2'",
    ],
)  # fmt: skip
def test_text_that_is_more_than_an_expression_over_one_row_is_refused(dataset, where):
    with pytest.raises(ConfigError, match="where: "):
        kept_of(dataset, where)


@pytest.mark.parametrize(
    "name", ["+", "year", "list_filter", "regexp_matches", "split_part", "list_append", "date_diff"]
)
def test_functions_with_one_result_are_allowed(name):
    from pipeline.loader.expression import changing_functions

    assert name not in changing_functions()


def test_long_lists_are_read_and_deep_nesting_is_refused(dataset):
    names = [f"'video{n:05d}-0000'" for n in range(0, 20000, 3)]
    assert len(ids(dataset, f"id in ({', '.join(names)})")) == sum(
        n % 3 == 0 for s in range(4) for n in range(100 * s, 100 * s + 9)
    )
    for count in (400, 5000):
        with pytest.raises(ConfigError, match="where: "):
            Expression("num_frames > 1" + " + 1" * count)


def test_columns_are_named_once_and_keys_apart():
    found = Expression("FPS > 1 and fps < 9 and metadata.A = metadata.a and len([x.id for x in metadata.a.b]) > 0")
    assert found.columns == [("fps",), ("metadata", "A"), ("metadata", "a"), ("metadata", "a", "b")]


# ---- columns of tars ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    return write_output(folder / "out", folder, list(shards()), WriteConfig(format="tar"))


@pytest.fixture
def ranges(monkeypatch):
    """Ranged reads of data files."""
    found = []
    original = LocalStore.read_range

    def counted(self, key, start, length, **options):
        found.append((key, start))
        return original(self, key, start, length, **options)

    monkeypatch.setattr(LocalStore, "read_range", counted)
    return found


def test_a_filter_of_a_tar_reads_each_row_of_undecided_files_once(tars, ranges):
    dataset = LatentDataset.open(tars.uri)
    ranges.clear()
    found = ids(dataset, "num_frames = 1 and metadata.score > 2 and id <> 'video00003-0000' and caption like '%3'")
    assert found == {"video00103-0000", "video00203-0000", "video00303-0000"}
    assert len(ranges) == len(set(ranges)) == 8  # images


def test_one_row_of_a_tar_is_one_read_of_its_columns(tars, ranges):
    dataset = LatentDataset.open(tars.uri, columns=("metadata", "fps"))
    ranges.clear()
    row = dataset.row("video00103-0000")
    assert row.columns == {"metadata": METADATA[3], "fps": 9.0}
    assert len(ranges) == 1
    names = ("fps", "metadata")
    number = next(n for n in range(len(dataset.files)) if dataset.indexes.get(n).find(row.id) is not None)
    index, places = dataset.indexes.get(number), [1, 0, 1]
    assert not dataset.scalars.holds(number, names, 0)
    found = [dataset.scalars.row(number, index, names, place) for place in places]
    assert dataset.scalars.holds(number, names, 0)
    assert [one["metadata"] for one in found] == [
        tars.clips[index.text("id", place)].sample.metadata for place in places
    ]
    assert len(ranges) == 3
