"""`docs/rejects.md` has every reason with its kind and every warning that the code can give, and no other."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "rejects.md").read_text()
SLUG = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")
# Calls that make a reject -> position of the reason, and whether it is policy (None: the call says).
CALLS: dict[str, tuple[int, bool | None]] = {
    "DamagedInput": (0, False),
    "PolicyReject": (0, True),
    "Reject": (2, None),
    "refused": (0, True),  # of `clips.choose_clips`
    "damage": (0, False),
    "Damage": (0, False),
    "_lost": (1, False),
}
COUNTERS = {"count": 1, "_count": 0}
LISTS = {"_warnings", "warnings", "decisions"}


@functools.cache
def files() -> list[tuple[str, list[ast.AST]]]:
    """(name, nodes of its syntax tree) of every file."""
    return [
        (path.relative_to(ROOT / "pipeline").as_posix(), list(ast.walk(ast.parse(path.read_text()))))
        for path in sorted((ROOT / "pipeline").rglob("*.py"))
    ]


def texts(node: ast.expr | None) -> Iterator[str]:
    """The texts that an expression may be, of both branches of a condition."""
    if isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and SLUG.fullmatch(node.value):
        yield node.value
    elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        slug, colon, _ = str(node.values[0].value).partition(":")
        if colon and SLUG.fullmatch(slug):
            yield slug


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def says_policy(call: ast.Call) -> bool | None:
    given = [item.value for item in call.keywords if item.arg == "policy"] + call.args[4:5]
    return given[0].value if given and isinstance(given[0], ast.Constant) else None


def reasons() -> dict[str, set[bool | None]]:
    found: dict[str, set[bool | None]] = defaultdict(set)
    for _, nodes in files():
        for node in nodes:
            if isinstance(node, ast.Call) and name_of(node) in CALLS:
                position, policy = CALLS[name_of(node)]
                for slug in texts(node.args[position] if len(node.args) > position else None):
                    found[slug].add(says_policy(node) if policy is None else policy)
            # (reason, message, policy), as the reader notes why a video cannot be had
            elif isinstance(node, ast.Tuple) and len(node.elts) == 3 and isinstance(node.elts[2], ast.Constant):
                if isinstance(node.elts[2].value, bool):
                    for slug in texts(node.elts[0]):
                        found[slug].add(node.elts[2].value)
            # (reason, message) of a shard as a whole
            elif isinstance(node, ast.FunctionDef) and node.name == "not_a_tar":
                for answer in ast.walk(node):
                    if isinstance(answer, ast.Return) and isinstance(answer.value, ast.Tuple):
                        for slug in texts(answer.value.elts[0]):
                            found[slug].add(False)
    return found


def warnings() -> set[str]:
    found: set[str] = set()
    for name, nodes in files():
        if not name.startswith(("video/", "reader/", "engine/")):
            continue
        for node in nodes:
            if isinstance(node, ast.JoinedStr) and len(node.values) > 1 and re.fullmatch(r"\w+:", texts_head(node)):
                found |= set(texts(node))
            elif isinstance(node, ast.Call) and name_of(node) in ("append", "add") and node.args:
                owner = node.func.value if isinstance(node.func, ast.Attribute) else None
                if (getattr(owner, "id", None) or getattr(owner, "attr", None)) in LISTS:
                    found |= set(texts(node.args[0]))
            elif isinstance(node, ast.Tuple) and len(node.elts) == 1 and name.startswith(("video/decode/", "reader/")):
                found |= {slug for slug in texts(node.elts[0]) if "_" in slug}
    return found


def counters() -> set[str]:
    """What the reader counts; reasons of its own rejects are counted as well."""
    found: set[str] = set()
    for name, nodes in files():
        if name.startswith("reader/"):
            for node in nodes:
                if (
                    isinstance(node, ast.Call)
                    and name_of(node) in COUNTERS
                    and len(node.args) > COUNTERS[name_of(node)]
                ):
                    argument = node.args[COUNTERS[name_of(node)]]
                    found |= {
                        slug for value in ast.walk(argument) if isinstance(value, ast.Constant) for slug in texts(value)
                    }
                elif isinstance(node, ast.Constant) and str(node.value).startswith("skipped_"):
                    found |= set(texts(node))
    return found


def texts_head(node: ast.JoinedStr) -> str:
    return str(node.values[0].value) if isinstance(node.values[0], ast.Constant) else ""


def documented() -> tuple[dict[str, str], set[str]]:
    """Reasons with their kind, and warnings."""
    before, after = PAGE.split("\n## Warnings\n")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| \S.*\| \S.*\|$", before, re.M)
    assert len(rows) == len(dict(rows)) == before.count("\n| `")
    names = [
        cell for row in re.findall(r"^\| (`[^|]+`) \| \S.*\|$", after, re.M) for cell in re.findall(r"`(\w+)`", row)
    ]
    assert len(names) == len(set(names))
    return dict(rows), set(names)


def test_every_reason_is_documented_with_its_kind_and_no_other():
    kinds = {
        slug: {{True: "policy", False: "damage"}.get(kind) for kind in found} - {None}
        for slug, found in reasons().items()
    }
    reported = documented()[0]
    assert sorted(kinds) == sorted(reported)
    assert {slug: found for slug, found in kinds.items() if found - {reported[slug]}} == {}


def test_every_warning_is_documented_and_no_other():
    assert sorted(warnings() | counters() | {"no_caption"}) == sorted(documented()[1])
