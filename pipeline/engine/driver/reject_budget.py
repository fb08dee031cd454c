"""Check of a build's damaged inputs against the job's `reject_budget` (ADR 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.records import Counts

MIN_EVIDENCE = 100  # inputs seen before the reject budget may stop a running build


def budget_exceeded(counts: Counts, budget: float, *, final: bool) -> str | None:
    """The message with which the build must stop because of too many damaged inputs, or None.

    One damaged input never exceeds a budget above 0, and nothing exceeds a budget of 1. While the build runs (not `final`), at least
    `MIN_EVIDENCE` inputs are assumed.
    """
    inputs = max(
        counts.samples + counts.damaged_regions, counts.damaged
    )  # `damaged_regions` is 0 in receipts of older versions
    tolerated = budget * (inputs if final else max(inputs, MIN_EVIDENCE))
    if budget == 1 or counts.damaged <= max(tolerated, 1 if budget > 0 else 0):
        return None
    what, regions = "samples" if inputs == counts.samples else "inputs", counts.damaged_regions
    apart = f" ({regions} of them parts of tars that belong to no sample)" if regions else ""
    return (
        f"{counts.damaged} of {inputs} {what}{apart} are damaged ({counts.damaged / inputs:.1%}), more than "
        f"reject_budget={budget:.1%}; see the rejects by reason; repair the inputs or raise reject_budget (1: never stop)"
    )
