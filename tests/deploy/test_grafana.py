"""The Grafana dashboard draws every series of the code, with labels that they have."""

import json
import re
from pathlib import Path

from pipeline.engine.ray.metrics import SERIES

BOARD = json.loads((Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "lathe.json").read_text())
OF_RAY = {"NodeAddress", "WorkerId", "SessionName"}  # on every series
SELECTOR = re.compile(r"\b(ray_[a-z0-9_]+)\b(?:\{([^}]*)\})?")


def expressions():
    found = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
    return found + [item["query"]["query"] for item in BOARD["templating"]["list"] if item["type"] == "query"]


def test_every_series_is_drawn_and_nothing_else():
    drawn = {name for expression in expressions() for name, _ in SELECTOR.findall(expression)}
    assert drawn == {series.exported for series in SERIES}


def test_counters_are_drawn_as_rates_or_differences_and_by_labels_that_they_have():
    """`increase` does not count the first value of a series, which may be the only shard that was given up."""
    series = {item.exported: item for item in SERIES}
    for expression in expressions():
        for name, matchers in SELECTOR.findall(expression):
            used = set(re.findall(r"(\w+)\s*=", matchers))
            assert used <= OF_RAY | {series[name].label}, expression
            if series[name].kind == "counter":
                difference = rf"\({name}(.*) - \({name}\1 offset 1h or 0 \* {name}\1\)\)"
                assert re.search(rf"rate\({name}|{difference}", expression), expression
        by = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        assert by <= OF_RAY | {item.label for item in series.values() if item.exported in expression}, expression


def test_panels_do_not_overlap_and_brackets_close():
    taken = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
    assert all(expression.count("(") == expression.count(")") for expression in expressions())
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_names_have_units_and_labels_are_bounded():
    for series in SERIES:
        assert re.fullmatch(r"lathe_[a-z0-9_]+", series.name)
        assert (series.kind == "counter") == series.name.endswith("_total")
        assert series.label in (None, "cause", "reason", "outcome")


def test_the_document_lists_every_series():
    text = (Path(__file__).resolve().parents[2] / "docs" / "monitoring.md").read_text()
    listed = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `lathe_")}
    assert set(listed) == {series.name for series in SERIES}
    assert [name for series in SERIES if (name := series.name) and series.about not in listed[name]] == []
