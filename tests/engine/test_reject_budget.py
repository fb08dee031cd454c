"""When damage stops a build: the share of inputs, and what counts as an input."""

import pytest

from pipeline.engine.driver.reject_budget import MIN_EVIDENCE, budget_exceeded
from pipeline.records import Counts


@pytest.mark.parametrize(
    ("samples", "damaged", "budget", "final", "stops"),
    [
        (6, 1, 0.05, True, False),  # one broken file never exceeds the budget
        (6, 1, 0.0, True, True),
        (6, 2, 0.05, True, True),
        (1000, 50, 0.05, True, False),
        (1000, 51, 0.05, True, True),
        (10, 5, 0.05, False, False),  # too little evidence to stop a running build
        (10, 6, 0.05, False, True),  # already more than 5 % of MIN_EVIDENCE
        (1000, 51, 0.05, False, True),
        (0, 1, 0.05, True, False),
        (0, 0, 0.0, True, False),
        (15, 15, 1.0, True, False),  # 1: nothing stops it
        (1000, 1000, 1.0, False, False),
        (15, 15, 0.99, True, True),
    ],
)
def test_reject_budget(samples, damaged, budget, final, stops):
    assert MIN_EVIDENCE == 100
    over = budget_exceeded(Counts(samples=samples, damaged=damaged), budget, final=final)
    assert (over is not None) == stops
    if over:
        assert f"{damaged} of {samples}" in over
        assert "reject_budget" in over


@pytest.mark.parametrize(
    ("samples", "damaged", "regions", "expected"),
    [
        (2, 15, 15, "15 of 17 inputs (15 of them parts of tars that belong to no sample) are damaged (88.2%)"),
        (0, 3, 3, "3 of 3 inputs (3 of them parts of tars that belong to no sample) are damaged (100.0%)"),
        (4, 4, 1, "4 of 5 inputs (1 of them parts of tars that belong to no sample) are damaged (80.0%)"),
        (2, 15, 0, "15 of 15 inputs are damaged (100.0%)"),  # of a receipt that did not count them apart
    ],
)
def test_damage_without_a_sample_counts_as_an_input_and_no_share_exceeds_one(samples, damaged, regions, expected):
    counts = Counts(samples=samples, damaged=damaged, damaged_regions=regions)
    over = budget_exceeded(counts, 0.5, final=True)
    assert over is not None
    assert over.startswith(expected)
    assert budget_exceeded(counts, 1.0, final=True) is None
