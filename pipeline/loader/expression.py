"""SQL expression of a filter, parsed by DuckDB: the columns that it names, and the same expression over rows and over ranges of files.

Columns get generated names, so that DuckDB, whose names ignore case, tells apart keys of metadata that differ in case only.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.format.columns import SCALARS
from pipeline.loader.buckets import NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COLUMNS = ("id", *SCALARS)
Path = tuple[str, ...]
"""A column; for metadata, the keys below it."""
FRAMES_BUCKET: Path = ("bucket", "by frames")
"""Bucket of a row as `Row.bucket` spells it, `9x256x256`: not a column of files, where it is `v9x256x256` or `vnx256x256`."""
ORDERED = ("id", "num_frames", "fps")
"""Columns of which the manifest has the smallest and the largest value in each file. None of them is ever null."""
CONSTANT = ("bucket", "fingerprint", "width", "height")
"""Columns with one value in all rows of a file."""
MOST_VALUES = 100  # of a list that are compared with the range of each file

Node = dict[str, Any]
_ALLOWED = (
    *("BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION"),
    *("LAMBDA", "OPERATOR", "TYPE"),
)
_MIRRORED = {
    "COMPARE_EQUAL": "COMPARE_EQUAL",
    "COMPARE_NOTEQUAL": "COMPARE_NOTEQUAL",
    "COMPARE_LESSTHAN": "COMPARE_GREATERTHAN",
    "COMPARE_GREATERTHAN": "COMPARE_LESSTHAN",
    "COMPARE_LESSTHANOREQUALTO": "COMPARE_GREATERTHANOREQUALTO",
    "COMPARE_GREATERTHANOREQUALTO": "COMPARE_LESSTHANOREQUALTO",
}
_BY_RANGE = {  # true of all values between low and high, and of one of them at least
    "COMPARE_EQUAL": ("({low} = {x} and {high} = {x})", "({low} <= {x} and {x} <= {high})"),
    "COMPARE_NOTEQUAL": ("({x} < {low} or {high} < {x})", "({low} <> {x} or {high} <> {x})"),
    "COMPARE_LESSTHAN": ("({high} < {x})", "({low} < {x})"),
    "COMPARE_GREATERTHAN": ("({low} > {x})", "({high} > {x})"),
    "COMPARE_LESSTHANOREQUALTO": ("({high} <= {x})", "({low} <= {x})"),
    "COMPARE_GREATERTHANOREQUALTO": ("({low} >= {x})", "({high} >= {x})"),
}
_FRAMES = re.compile(r"[(^]*\d+x")  # beginning of a bucket as `Row.bucket` spells it, also in a pattern
_HANDLES_NULL = ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "OPERATOR_COALESCE")


class Expression:
    """`columns`: what it names, spelled as in files. `optional`: keys of metadata that it tests for null.

    `over_rows`: SQL over columns `name(path)`. `over_files`: SQL over columns `name(path, "low")` and `name(path, "high")`, of `ORDERED`,
    `CONSTANT`, `FRAMES_BUCKET` and of paired videos: whether it is true of all rows of a file, and whether it may be true of one.
    """

    def __init__(self, where: str, members: Sequence[str] = ()) -> None:
        """Parses `where`. `members`: names of paired videos; the column of such a name is whether a row has it.

        Raises:
            ConfigError: not one expression over the columns of one row, an unknown column, a function that changes from call to call.
        """
        if not isinstance(where, str) or not where.strip():
            raise ConfigError(f"where: expected an SQL expression, got {where!r}; leave it out to take all rows")
        self.where, self._members = where, tuple(members)
        self._connection = connect()
        self.optional: set[Path] = set()
        self._names: dict[Path, str] = {}
        try:
            self._select = self._parse()
            tree = self._named(self._select["statements"][0]["node"]["select_list"][0], frozenset())
            self.over_rows = self._sql(tree)
            self.over_files = self._bounds(tree)
        except RecursionError:
            raise ConfigError("where: the expression is nested too deeply; write lists as `id in (...)`") from None
        self.columns = list(self._names)

    def name(self, path: Path, bound: str = "") -> str:
        """Generated name of a column; of its lowest or highest value in a file for `bound` `low` or `high`."""
        return f"{self._names[path]}{bound}"

    def _parse(self) -> Node:
        (text,) = self._connection.execute("select json_serialize_sql(?)", [f"select {self.where}\n"]).fetchone()
        found: Node = json.loads(text)
        if found["error"]:
            raise ConfigError(f"where: {self.where!r} is not an SQL expression: {found['error_message']}")
        nodes = [statement["node"] for statement in found["statements"]]
        plain = len(nodes) == 1 and nodes[0]["type"] == "SELECT_NODE" and len(nodes[0]["select_list"]) == 1
        odd = ["modifiers", "where_clause", "group_expressions", "group_sets", "having", "sample", "qualify"]
        if (
            not plain
            or any(nodes[0].get(name) for name in odd)
            or nodes[0]["from_table"]["type"] != "EMPTY"
            or nodes[0]["cte_map"]["map"]
            or nodes[0]["select_list"][0]["alias"]
        ):
            raise self._not_one_row()
        for node in _nodes(nodes[0]["select_list"][0]):
            if node.get("class", "FUNCTION") not in _ALLOWED:
                raise self._not_one_row()
            if node.get("function_name", "").lower() in changing_functions():
                raise _changing(f"{node['function_name']}()")
        return found

    def _not_one_row(self) -> ConfigError:
        return ConfigError(
            "where: expected an expression over the columns of one row, without subqueries, aggregates and clauses of a query, "
            f"got {self.where!r}"
        )

    def _named(self, node: Any, bound: frozenset[str]) -> Any:
        """The tree with generated names of columns. `bound`: parameters of lambdas."""
        if isinstance(node, list):
            return [self._named(item, bound) for item in node]
        if not isinstance(node, dict):
            return node
        if node.get("class") == "COLUMN_REF":
            path = tuple(node["column_names"])
            return node if path[0].lower() in bound else self._reference(node, self._spelled(path))
        if (tested := self._tested_member(node)) is not None:
            return tested
        if node.get("class") == "LAMBDA":
            lhs = [item["column_names"] for item in _nodes(node["lhs"]) if item.get("class") == "COLUMN_REF"]
            parameters = {names[0].lower() for names in lhs if len(names) == 1} - set(COLUMNS)
            if parameters:  # otherwise `->` reads JSON. DuckDB has `x -> ...` no more after 2.0
                node, bound = {**node, "syntax_type": "LAMBDA_KEYWORD"}, bound | parameters
        if node.get("type") in ("ARRAY_EXTRACT", "STRUCT_EXTRACT"):
            held, key = node["children"][0], _text(node["children"][1])
            if key is not None and [name.lower() for name in held.get("column_names", [])] == ["metadata"]:
                raise ConfigError(f"where: write keys of metadata as metadata.KEY, here metadata.{key}")
        if node.get("type") in _HANDLES_NULL:
            refs = [tuple(child["column_names"]) for child in node["children"] if child.get("class") == "COLUMN_REF"]
            self.optional.update(self._spelled(path) for path in refs if path[0].lower() not in bound)
        node = self._spell_buckets(node)
        made = {name: self._named(value, bound) for name, value in node.items()}
        test = made.get("class") in ("COMPARISON", "BETWEEN", "FUNCTION") or made.get("type") == "COMPARE_IN"
        if test and ("bucket",) in self._paths(made):
            texts = [text for text in map(_text, _nodes(made)) if text is not None and _FRAMES.match(text)]
            if texts:  # it would match nothing, as this column begins with a v
                raise ConfigError(
                    f"where: test bucket itself against {texts[0]!r}, with =, <>, in or like; as part of another expression it is "
                    "spelled v9x256x256"
                )
        return made

    def _tested_member(self, node: Node) -> Any:
        """`control is null` and `control is not null` as a test of whether a row has this paired video; None for every other node."""
        if node.get("type") not in ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"):
            return None
        (child,) = node["children"]
        name = next((name for name in self._members if child.get("column_names") == [name]), None)
        if name is None:
            return None
        has = self._reference(child, (name,))
        return has if node["type"] == "OPERATOR_IS_NOT_NULL" else {**node, "type": "OPERATOR_NOT", "children": [has]}

    def _reference(self, node: Node, path: Path) -> Node:
        name = self._names.setdefault(path, f"lathe:{len(self._names)}")
        return {**node, "column_names": [name]}

    def _spelled(self, path: Path) -> Path:
        if path == FRAMES_BUCKET:
            return path
        name = next((known for known in COLUMNS if known == path[0].lower()), None)
        if path[0] in self._members:
            raise ConfigError(f"where: {path[0]} is a paired video; test it with `{path[0]} is not null` or `is null`")
        if name is None and len(path) == 1 and path[0].lower() in changing_functions():
            raise _changing(path[0])
        if name is None or (len(path) > 1 and name != "metadata"):
            raise ConfigError(
                f"where: no column {'.'.join(path)}; there are {', '.join(COLUMNS)}, and keys of metadata as metadata.KEY"
            )
        return (name, *path[1:])

    def _spell_buckets(self, node: Node) -> Node:
        """A test of `bucket` against texts as a test of the column that spells buckets as they do."""
        kind = node.get("class")
        if kind == "COMPARISON":
            parts = [node["left"], node["right"]]
        elif node.get("type") == "COMPARE_IN":
            parts = node["children"]
        elif kind == "FUNCTION":  # also `like`
            parts = [item["expression"] for item in node["arguments"]]
        else:
            return node
        if not any(map(_is_bucket, parts)) or not any(_text(part) is not None for part in parts):
            return node
        if kind != "FUNCTION" and (odd := [text for text in map(_text, parts) if text and not NAME.fullmatch(text)]):
            raise ConfigError(
                f"where: {odd[0]!r} is not the name of a bucket; expected FRAMESxHEIGHTxWIDTH, or a pattern after `like`"
            )
        parts = [_with_v(part) for part in parts]
        if node.get("type") == "COMPARE_IN":
            by_frames = [part for part in parts[1:] if _by_frames(part)]
            others = [part for part in parts[1:] if not _by_frames(part)]
            tests = [
                {**node, "children": [_frames_bucket(parts[0]) if found is by_frames else parts[0], *found]}
                for found in (by_frames, others)
                if found and _is_bucket(parts[0])
            ]
            either = {"class": "CONJUNCTION", "type": "CONJUNCTION_OR", "alias": "", "query_location": 0}
            return node if not tests else tests[0] if len(tests) == 1 else {**either, "children": tests}
        frames = any(map(_by_frames, parts))
        spelled = [_frames_bucket(part) if frames and _is_bucket(part) else part for part in parts]
        if kind == "COMPARISON":
            return {**node, "left": spelled[0], "right": spelled[1]}
        arguments = [{**item, "expression": part} for item, part in zip(node["arguments"], spelled, strict=True)]
        return {**node, "arguments": arguments}

    # ---- over ranges of files --------------------------------------------------------------------------------------

    def _bounds(self, node: Node) -> tuple[str, str]:
        if node["class"] == "CONJUNCTION":
            word = " and " if node["type"] == "CONJUNCTION_AND" else " or "
            parts = [self._bounds(child) for child in node["children"]]
            return f"({word.join(sure for sure, _ in parts)})", f"({word.join(possible for _, possible in parts)})"
        if node.get("type") == "OPERATOR_NOT":
            sure, some = self._bounds(node["children"][0])
            return f"(not {some})", f"(not {sure})"
        if node["class"] == "COMPARISON" and node["type"] in _MIRRORED:
            for one, other, kind in (
                (node["left"], node["right"], node["type"]),
                (node["right"], node["left"], _MIRRORED[node["type"]]),
            ):
                if self._is_ordered(one) and not self._paths(other):
                    return self._compared(one, other, kind)
        if node["type"] == "COMPARE_BETWEEN":
            column, kinds = node["input"], ["COMPARE_GREATERTHANOREQUALTO", "COMPARE_LESSTHANOREQUALTO"]
            values, word = [node["lower"], node["upper"]], " and "
        elif node["type"] == "COMPARE_IN":
            column, values, word = node["children"][0], node["children"][1:], " or "
            kinds = ["COMPARE_EQUAL"] * len(values)
        else:
            return self._leaf(node)
        if not self._is_ordered(column) or len(values) > MOST_VALUES or any(map(self._paths, values)):
            return self._leaf(node)
        pairs = [self._compared(column, value, kind) for value, kind in zip(values, kinds, strict=True)]
        return f"({word.join(sure for sure, _ in pairs)})", f"({word.join(possible for _, possible in pairs)})"

    def _compared(self, column: Node, value: Node, kind: str) -> tuple[str, str]:
        (path,) = self._paths(column)
        low, high = (f'"{self.name(path, bound)}"' for bound in ("low", "high"))
        sure, possible = (text.format(low=low, high=high, x=self._sql(value)) for text in _BY_RANGE[kind])
        return sure, possible

    def _leaf(self, node: Node) -> tuple[str, str]:
        """Decided where its columns have one value in the file."""
        paths = self._paths(node)
        if not all(path == FRAMES_BUCKET or path[0] in (*ORDERED, *CONSTANT, *self._members) for path in paths):
            return "false", "true"
        node = copy.deepcopy(node)
        for item in _nodes(node):
            if item.get("class") == "COLUMN_REF" and item["column_names"][0].startswith("lathe:"):
                item["column_names"][0] += "low"
        same = [f'"{self.name(path, "low")}" = "{self.name(path, "high")}"' for path in paths] or ["true"]
        constant = f"coalesce({' and '.join(same)}, false)"
        return (f"(case when {constant} then {self._sql(node)} else false end)",
                f"(case when {constant} then {self._sql(node)} else true end)")  # fmt: skip

    def _is_ordered(self, node: Node) -> bool:
        return node.get("class") == "COLUMN_REF" and all(path[0] in ORDERED for path in self._paths(node) or [("",)])

    def _paths(self, node: Node) -> list[Path]:
        """Columns in a part of the tree."""
        of_name = {name: path for path, name in self._names.items()}
        named = {item["column_names"][0] for item in _nodes(node) if item.get("class") == "COLUMN_REF"}
        return [of_name[name] for name in sorted(named) if name in of_name]

    def _sql(self, node: Node) -> str:
        (statement,) = self._select["statements"]
        tree = {**self._select, "statements": [{**statement, "node": {**statement["node"], "select_list": [node]}}]}
        (text,) = self._connection.execute("select json_deserialize_sql(?)", [json.dumps(tree)]).fetchone()
        return f"({text.removeprefix('SELECT ')})"


def connect() -> Any:
    """A connection to a DuckDB of two threads that reads no files. Raises ConfigError if it is not installed."""
    return _database(os.getpid()).cursor()


@functools.cache
def _database(process: int) -> Any:
    """One for each process: a forked one does not have the threads of its parent."""
    try:
        import duckdb
    except ImportError:
        raise ConfigError("where: needs DuckDB, which is not installed; run `pip install lathe[filter]`") from None
    return duckdb.connect(config={"enable_external_access": "false", "threads": "2"})


@functools.cache
def changing_functions() -> frozenset[str]:
    """Functions of DuckDB that do not give one value for one argument: clocks, random numbers, state of the process."""
    rows = (
        connect()
        .execute("select lower(function_name), function_type, stability, macro_definition from duckdb_functions()")
        .fetchall()
    )
    kinds: dict[str, set[str]] = {}
    for name, kind, stability, _ in rows:
        if kind == "scalar":
            kinds.setdefault(name, set()).add(stability)
    # Sums and parts of dates have one form that depends on the time zone beside others that do not.
    found = {name for name, all_kinds in kinds.items() if "CONSISTENT" not in all_kinds or "VOLATILE" in all_kinds}
    found |= {"age", "current_time", "current_timestamp", "localtime", "localtimestamp", "current_user", "session_user"}
    for name, _, _, body in rows:
        words = set(re.findall(r"\w+", (body or "").lower()))
        if body and (words & found or "select" in words):
            found.add(name)
    return frozenset(found)


def _changing(name: str) -> ConfigError:
    return ConfigError(f"where: {name} gives other values at each call, so that the order could not be repeated")


def _nodes(tree: Any) -> Iterator[Node]:
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from _nodes(item)


def _text(node: Node) -> str | None:
    literal = node.get("literal") or {}
    return literal["text"] if node.get("class") == "CONSTANT" and literal.get("kind") == "STRING" else None


def _is_bucket(node: Node) -> bool:
    return node.get("class") == "COLUMN_REF" and [name.lower() for name in node["column_names"]] == ["bucket"]


def _by_frames(node: Node) -> bool:
    """Whether a text begins as `Row.bucket` does, with a number of frames, also as a pattern."""
    text = _text(node)
    return text is not None and _FRAMES.match(text) is not None


def _with_v(node: Node) -> Node:
    """`nx256x256` as files spell it."""
    text = _text(node) or ""
    return {**node, "literal": {**node["literal"], "text": f"v{text}"}} if text.startswith("nx") else node


def _frames_bucket(node: Node) -> Node:
    return {**node, "column_names": list(FRAMES_BUCKET)}
