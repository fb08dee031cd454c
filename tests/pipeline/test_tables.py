"""Tables that list or annotate inputs: what they name, in which formats, what is refused, and which digests their rows give."""

from __future__ import annotations

import datetime
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import StorageConfig, TableConfig, validate
from pipeline.corpus import Annotations, PassedOver, resolve_inputs
from pipeline.errors import ConfigError, InputError
from pipeline.records import MISSING, Shard
from pipeline.records.annotation_rows import unpacked
from pipeline.storage import open_store

STORAGE = StorageConfig()
ROWS = [
    {"path": "a.mp4", "caption": "größer, mit\nZeile", "score": "1"},
    {"path": "deep/b.webm", "caption": "", "score": "2"},
    {"path": "gone.mp4", "caption": "c", "score": "3"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for name in ("a.mp4", "deep/b.webm", "c.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "t.tar").write_bytes(bytes(1024))
    return tmp_path


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    suffix = path.suffix
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row, default=str)}\n" for row in rows))
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            lines = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            lines.writeheader()
            lines.writerows(rows)
    return path


def resolve(*inputs: object, table: object = None, **columns: object) -> list[Shard]:
    """Shards with the rows about their objects."""
    config = validate(TableConfig, columns)
    with Annotations(config, STORAGE, "clips", table=None if table is None else str(table)) as annotations:
        shards = resolve_inputs([str(text) for text in inputs], STORAGE, PassedOver(), annotations=annotations)
        return [annotations.with_rows(shard) for shard in shards]


def values(shards: list[Shard]) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = {}
    for row in itertools.chain(*(unpacked(shard.rows) for shard in shards)):
        found.setdefault(row.uri.rpartition("/")[2], []).append(json.loads(row.text))
    return found


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_a_table_of_inputs_gives_its_videos_in_the_order_of_any_other_input(folder, suffix):
    table = write(folder / f"table{suffix}", ROWS)
    (shard,) = resolve(table)
    assert [source.uri for source in shard.objects] == [
        f"{folder}/{name}" for name in ("a.mp4", "deep/b.webm", "gone.mp4")
    ]
    assert [source.etag == MISSING for source in shard.objects] == [False, False, True]
    assert values([shard])["a.mp4"] == [{"caption": "größer, mit\nZeile", "score": "1"}]
    assert [source.size for source in shard.objects] == [5, 11, 0]
    (files,) = resolve_inputs([str(folder / "a.mp4"), str(folder / "deep")], STORAGE)
    assert [(each.uri, each.etag) for each in files.objects] == [(each.uri, each.etag) for each in shard.objects[:2]]


def test_blanks_around_names_and_empty_lines_of_a_csv_are_not_part_of_it(folder):
    (folder / "t.csv").write_text("\npath, caption\n\na.mp4, x\n")
    assert values(resolve(folder / "t.csv")) == {"a.mp4": [{"caption": " x"}]}


def test_two_columns_of_a_parquet_with_one_name_are_refused(folder):
    names = ["path", "caption", "caption"]
    pq.write_table(pa.table([pa.array([text]) for text in ("a.mp4", "x", "y")], names=names), folder / "t.parquet")
    with pytest.raises(InputError, match="two columns have the same name: path, caption, caption"):
        resolve(folder / "t.parquet")


def test_digests_do_not_depend_on_the_order_the_format_or_other_rows(folder):
    rows = [{**row, "caption": row["caption"] or None} for row in ROWS]
    first = resolve(write(folder / "a.csv", ROWS))[0].objects
    others = [
        write(folder / "b.jsonl", rows[::-1]),
        write(folder / "c.parquet", [*rows, rows[0], {"path": "c.mp4", "caption": "more", "score": "9"}]),
    ]
    for table in others:
        assert resolve(table)[0].objects[-len(first) :] == first or set(first) <= set(resolve(table)[0].objects)
    changed = resolve(write(folder / "d.csv", [{**ROWS[0], "score": "1.5"}, *ROWS[1:]]))[0].objects
    assert [a == b for a, b in zip(first, changed, strict=True)] == [False, True, True]


def test_columns_that_are_left_out_change_nothing(folder):
    tables = [write(folder / f"{n}.csv", [{**row, "seen": str(n)} for row in ROWS]) for n in (1, 2)]
    digests = [resolve(table, fields="score")[0].objects for table in tables]
    assert digests[0] == digests[1]
    assert values(resolve(tables[0], fields="score"))["b.webm"] == [{"score": "2"}]


def test_columns_can_be_named(folder):
    rows = [{"media": "a.mp4", "cap": "x", "long": ["y", "z"], "from": 1.5, "to": 2, "clips": [[1, 2]]}]
    table = write(folder / "t.parquet", rows)
    found = values(resolve(table, source="media", captions="cap,long", start="from", end="to", fields="clips"))
    assert found == {
        "a.mp4": [
            {
                "captions": [
                    {"name": "cap", "text": "x"},
                    {"name": "long", "text": "y"},
                    {"name": "long", "text": "z"},
                ],
                "start": 1.5,
                "end": 2,
                "clips": [[1, 2]],
            }
        ]
    }


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_named_captions_keep_their_order(folder, suffix):
    table = write(folder / f"t{suffix}", [{"path": "a.mp4", "captions": {"short": "s", "long": ["l"], "brief": None}}])
    (row,) = values(resolve(table))["a.mp4"]
    assert row == {"captions": [{"name": "short", "text": "s"}, {"name": "long", "text": "l"}]}


def test_values_that_json_lacks_become_text_and_binary_columns_are_left_out(folder):
    day = datetime.date(2026, 11, 29)
    table = pa.table({"path": ["a.mp4"], "day": [day], "long": [datetime.timedelta(seconds=8.5)], "icon": [b"\x89PNG"]})
    table = table.append_column("picture", pa.array([{"bytes": b"\x89", "path": "a"}])).append_column(
        "raw", pa.array([[b"1"]])
    )
    pq.write_table(table, folder / "t.parquet")
    assert values(resolve(folder / "t.parquet")) == {"a.mp4": [{"day": "2026-11-29", "long": "0:00:08.500000"}]}


# pandas cannot be imported in it, as where only Lathe is installed.
WITHOUT_PANDAS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pandas":
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from pipeline.config import TableConfig
from pipeline.corpus.tables import read_rows
print(*(row.text.decode() for row in read_rows(sys.argv[1], sys.argv[1], TableConfig(), "clips")), sep="\\n")
"""


def test_times_have_one_text_with_and_without_pandas_in_all_units_and_nestings(folder):
    """pyarrow gives nanoseconds as objects of pandas, which have other text, or not at all."""
    second, half = datetime.timedelta(seconds=1), datetime.timedelta(seconds=4, milliseconds=500)
    moment = datetime.datetime(2026, 11, 29, 8, 30, 1, 250_000)
    times = {"start": [half / 3], "end": [half], "at": [moment], "hour": [moment.time()], "several": [[second, None]]}
    kinds = {"start": pa.duration, "end": pa.duration, "at": pa.timestamp, "hour": pa.time64}
    texts = []
    for unit in ("us", "ns"):
        columns = {name: pa.array(times[name], kind(unit)) for name, kind in kinds.items()}
        columns["several"] = pa.array(times["several"], pa.list_(pa.duration(unit)))
        columns["inside"] = pa.array(
            [{"at": moment, "n": 1}], pa.struct([("at", pa.timestamp(unit, "UTC")), ("n", pa.int8())])
        )
        columns["named"] = pa.array([[("a", second)]], pa.map_(pa.string(), pa.duration(unit)))
        columns["coded"] = pa.array([moment], pa.timestamp(unit)).dictionary_encode()
        path = folder / f"{unit}.parquet"
        pq.write_table(pa.table({"path": ["a.mp4"], **columns}), path)
        texts += values(resolve(path))["a.mp4"]
        command = [sys.executable, "-c", WITHOUT_PANDAS, str(path)]
        texts.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    assert texts == 4 * [
        {
            "start": "0:00:01.500000",
            "end": "0:00:04.500000",
            "at": "2026-11-29 08:30:01.250000",
            "hour": "08:30:01.250000",
            "several": ["0:00:01", None],
            "inside": {"at": "2026-11-29 08:30:01.250000+00:00", "n": 1},
            "named": [["a", "0:00:01"]],
            "coded": "2026-11-29 08:30:01.250000",
        }
    ]


def test_nanoseconds_are_cut_and_times_of_spark_reach_the_year_9999(folder):
    odd = pa.table({"path": ["a.mp4"], "at": pa.array([1_500_000_001], pa.timestamp("ns"))})
    pq.write_table(odd, folder / "t.parquet")
    assert values(resolve(folder / "t.parquet")) == {"a.mp4": [{"at": "1970-01-01 00:00:01.500000"}]}
    far = pa.table({"path": ["a.mp4"], "at": pa.array([datetime.datetime(9999, 12, 31)], pa.timestamp("us"))})
    pq.write_table(far, folder / "t.parquet", use_deprecated_int96_timestamps=True)
    assert values(resolve(folder / "t.parquet")) == {"a.mp4": [{"at": "9999-12-31 00:00:00"}]}


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([0, 10**15], pa.timestamp("s")), r"timestamp\[ms\]"),
        (pa.array([0, 10**7], pa.date32()), r"date32\[day\]"),
        (pa.array([[0], [2**62]], pa.list_(pa.duration("ms"))), r"list<element: duration\[ms\]>"),
        (
            pa.StructArray.from_arrays([pa.array([1, 2])] * 2, names=["x", "x"], mask=pa.array([True, False])),
            "struct<x: int64, x: int64>",
        ),
        (pa.array([None, 1], pa.timestamp("us", "Foo/Bar")), r"timestamp\[us, tz=Foo/Bar\]"),
    ],
)
def test_a_value_that_python_lacks_is_named_by_row_and_column(folder, column, kind):
    pq.write_table(pa.table({"path": ["a.mp4"] * 1024, "t": pa.nulls(1024, column.type)}), folder / "t.parquet")
    first = pq.read_table(folder / "t.parquet")
    table = pa.concat_tables([first, pa.table({"path": ["a.mp4"] * 2, "t": column}).cast(first.schema)])
    pq.write_table(table, folder / "t.parquet")
    with pytest.raises(
        InputError, match=rf"t\.parquet: row 1026, column 't': a value of {kind} cannot be read \(.*; expected times"
    ):
        resolve(folder / "t.parquet")


def test_annotations_are_keyed_by_source_and_key(folder):
    rows = [
        {"source": "t.tar", "key": "k1", "caption": "one"},
        {"source": str(folder / "t.tar"), "key": "k2", "caption": "two"},
        {"source": "c.mp4", "key": None, "caption": "plain"},
        {"source": "elsewhere.tar", "key": "k", "caption": "not an input"},
    ]
    shards = resolve(folder, table=write(folder / "notes.parquet", rows))
    assert [(row.key, json.loads(row.text)["caption"]) for row in unpacked(shards[0].rows)] == [
        ("k1", "one"),
        ("k2", "two"),
    ]
    annotated = {source.uri.rpartition("/")[2] for shard in shards for source in shard.objects if source.annotations}
    assert annotated == {"t.tar", "c.mp4"}


def test_a_folder_or_pattern_of_parts_is_one_table(folder):
    (folder / "parts.parquet").mkdir()
    for number, row in enumerate(ROWS[:2]):
        write(folder / "parts.parquet" / f"part-{number}.parquet", [{**row, "path": str(folder / str(row["path"]))}])
    (folder / "parts.parquet" / "_SUCCESS").write_text("")
    for text in ("parts.parquet", "parts.parquet/part-*.parquet"):
        (shard,) = resolve(folder / text)
        assert [source.uri.rpartition("/")[2] for source in shard.objects] == ["a.mp4", "b.webm"]


def test_rows_that_name_other_files_are_passed_over(folder):
    (folder / "x.srt").write_text("")
    table = write(folder / "t.csv", [{"path": "a.mp4"}, {"path": "x.srt"}])
    passed_over = PassedOver()
    resolve_inputs([str(table)], STORAGE, passed_over)
    assert "1 .srt (subtitles are not read" in passed_over.line()


@pytest.mark.parametrize(
    ("name", "text", "options", "error", "named"),
    [
        ("t.csv", "what,why\na.mp4,b\n", {}, InputError, "no column names the video or tar of a row.*: what, why"),
        (
            "t.csv",
            "path\na.mp4\n",
            {"source": "pth"},
            ConfigError,
            "table.source: .*no column 'pth'; its columns: path",
        ),
        (
            "t.csv",
            "path,caption\na.mp4,\n",
            {"captions": "caption,cap"},
            ConfigError,
            "table.captions: .*no column 'cap'",
        ),
        (
            "t.csv",
            "source,path\nyoutube,a.mp4\nx.jpg,b\n",
            {},
            InputError,
            "t.csv: no row names a tar or video; they name 1 .jpg, 1 without an extension.*youtube. table.source=COLUMN",
        ),
        ("t.csv", "path\na.mp4\n", {"fields": "x,y"}, ConfigError, "table.fields: .*no column 'x'"),
        ("t.csv", "path,n\na.mp4\n", {}, InputError, "line 2 has 1 cells, expected 2: path, n"),
        ("t.csv", "path,path\na.mp4,b\n", {}, InputError, "two columns have the same name"),
        ("t.csv", "path,n\na.mp4,1\n,2\n", {}, InputError, "row 2 has None in column 'path'; expected the path or URI"),
        ("t.csv", "path\n", {}, InputError, "has no rows"),
        ("t.csv", 'path\n"a.mp4\n', {}, InputError, "cannot be read as a table after row 0: .*expected Parquet, CSV"),
        ("t.csv", b"path\n\xff\xfe.mp4\n", {}, InputError, "cannot be read as a table.*UTF-8"),
        ("t.jsonl", '{"path": "a.mp4"}\n{"path"\n', {}, InputError, "line 2 is not JSON"),
        ("t.jsonl", '["a.mp4"]\n', {}, InputError, "line 1 is list, expected a JSON object"),
        ("t.jsonl", '{"path": 7}\n', {}, InputError, "row 1 has 7 in column 'path'"),
        ("t.parquet", "PAR1", {}, InputError, "cannot be read as a table"),
        (
            "t.csv",
            "path\na.mp4\nhttps://x.org/b.mp4\n",
            {},
            InputError,
            "row 2 names 'https://x.org/b.mp4'; .*not supported",
        ),
        ("gone.csv", None, {}, InputError, "gone.csv does not exist; .* holds"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_before_anything_starts(folder, name, text, options, error, named):
    if text is not None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=named):
        resolve(folder / name, **options)


def test_annotations_of_no_input_are_refused(folder):
    table = write(folder / "notes.csv", [{"source": "tars/t.tar", "key": "k"}])
    with pytest.raises(
        InputError, match=r"notes.csv: none of its 1 rows is about an input; the first names 'tars/t.tar'"
    ):
        resolve(folder / "t.tar", table=table)
    with pytest.raises(InputError, match=r"notes.txt: expected a table, one of \.parquet, \.csv"):
        resolve(folder / "t.tar", table=folder / "notes.txt")


@pytest.mark.s3
def test_a_table_in_a_bucket_names_objects_beside_it(s3):
    config = s3.config()
    store = open_store(s3.root, config)
    store.write("set/a.mp4", b"12345")
    store.write("up.mp4", b"12")
    store.write("set/table.csv", b"path,caption\n./a.mp4,x\ngone.mp4,y\n../up.mp4,z\n")
    with Annotations(TableConfig(), config, "clips") as annotations:
        (shard,) = resolve_inputs([store.uri("set/table.csv")], config, PassedOver(), annotations=annotations)
        rows = list(unpacked(annotations.with_rows(shard).rows))
    assert [(source.uri, source.size) for source in shard.objects] == [
        (store.uri("set/a.mp4"), 5),
        (store.uri("set/gone.mp4"), 0),
        (store.uri("up.mp4"), 2),
    ]
    assert [json.loads(row.text) for row in rows] == [{"caption": "x"}, {"caption": "y"}, {"caption": "z"}]
