"""Rejects in a published snapshot: those that a retry replaced are not among them."""

from __future__ import annotations

from types import SimpleNamespace

from pipeline.ledger.receipts import Ledger
from pipeline.operate.diff import diff
from tests.pipeline.published import publish_all


def test_rejects_that_a_retry_recovered_leave_the_snapshot(workspace: SimpleNamespace) -> None:
    Ledger(workspace.store).prepare("films")
    workspace.run("abcd").finish({"b": "too_short", "c": "too_small"})
    first = publish_all(workspace.store)
    assert first.rejects == {"too_short": 1, "too_small": 1}
    assert first.videos == {
        "encoded": {"px720": 2, "s5": 2, "ms": 10_000},
        "rejected": {"px480": 2, "s1": 2, "ms": 3000},
        "refused": {"v9": 2},
    }
    workspace.run("abcd", retry_rejects="too_short").finish()
    second = publish_all(workspace.store)
    assert (second.rejects, second.counts["rejected"], second.counts["rows"]) == ({"too_small": 1}, 1, 3)
    assert (second.videos["encoded"]["px720"], second.videos["rejected"]["px480"]) == (3, 1)
    assert diff((workspace.store, 1), (workspace.store, 2))["rejects"]["too_short"] == -1
    workspace.run("abcd", retry_rejects="too_small").finish({"c": "decode_timeout"})
    third = publish_all(workspace.store)
    assert (third.rejects, third.counts["rejected"]) == ({"decode_timeout": 1}, 1)
