"""`make bench`: every benchmark is run or named as not run, its results are read, and all of them still import."""

import ast
import importlib
import re
import sys

import pytest

from benchmarks import run_all
from benchmarks.network_rows import Row, results

SCRIPTS = sorted(
    path.stem
    for path in run_all.ROOT.joinpath("benchmarks").glob("*.py")
    if "__main__" in path.read_text() and path.stem != "run_all"
)


def test_every_benchmark_is_run_or_named_as_not_run():
    run = {entry.script for entry in run_all.ENTRIES}
    assert sorted(run | set(run_all.NOT_RUN)) == SCRIPTS
    assert not run & set(run_all.NOT_RUN)


def test_every_benchmark_that_is_run_prints_results():
    for script in {entry.script for entry in run_all.ENTRIES}:
        folder = run_all.ROOT / "benchmarks"
        texts = [folder / f"{script}.py", *([folder / "network_rows.py"] if script == "networks" else [])]
        constants = [
            node.value
            for path in texts
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert any(text.startswith("RESULT ") for text in constants), script


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_imports(name, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which some set, and extend the path: both only for this test
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.import_module(f"benchmarks.{name}")


def test_result_lines_become_rows_with_verdicts():
    lines = (
        "noise",
        "RESULT 0.92 >= 0.9 end to end, inline",
        "RESULT 61 <= 50 ms a shard",
        "RESULT 1.2e-6 <= 1e-5 error",
    )
    output = "\n".join([*lines, "RESULT 480 frames a second", ""])
    rows = run_all.results(output)
    assert [(row.name, row.value, row.bar, row.verdict) for row in rows] == [
        ("end to end, inline", "0.92", "0.9", "ok"),
        ("ms a shard", "61", "50", "MISSED"),
        ("error", "1.2e-6", "1e-5", "ok"),
        ("frames a second", "480", "", ""),
    ]
    assert run_all.table(rows).splitlines()[2].split() == ["ms", "a", "shard", "61", "<=", "50", "MISSED"]


def test_every_number_of_the_readme_has_a_benchmark_that_is_run():
    table = run_all.ROOT.joinpath("README.md").read_text().split("\n## Benchmarks\n")[1].split("\n## ")[0]
    named = re.findall(r"\| `(\w+)` \|$", table, re.MULTILINE)
    assert len(named) == sum(line.startswith("| ") for line in table.splitlines()) - 1 > 5  # the head
    assert set(named) <= {entry.script for entry in run_all.ENTRIES}


def test_the_plain_network_is_not_compared_with_itself():
    def row(direction, dtype, of_plain):
        return Row(
            "leanvae-dim16", "17x256x256", direction, dtype, 1, 1.0, 17.0, 1.0, None, None, of_plain, "float32", 2e-6
        )

    rows = [row("encode (plain)", "float32", 1.0), row("encode", "float32", 1.1), row("encode", "bfloat16", 2.9)]
    read = run_all.results("\n".join(results(rows)))
    assert [(item.value, item.bar) for item in read] == [("1.10", ""), ("2.0e-06", "1e-05"), ("2.90", "")]
