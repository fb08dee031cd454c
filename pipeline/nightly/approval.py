"""Refusal of a night before anything is encoded: another corpus than the output's, or settings that changed since its last receipt.

Takes the plan of the build and the store of the output. Reads one receipt, and only for a refusal.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, InputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summary import uri_id

if TYPE_CHECKING:
    from pipeline.engine.driver.budget import BuildPlan
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.records import Receipt
    from pipeline.storage import Store

NAMED = 8  # differences in a message
LONGEST = 60  # characters of a value
ABSENT = "(none)"


def check_corpus(store: Store, plan: BuildPlan) -> None:
    """Compares inputs with those of the output, by URI.

    Raises:
        InputError: the output has inputs, and none of those listed is among them.
    """
    if plan.overlaps:
        return
    known = {uri for item in plan.receipts for uri in item.uri_ids()}
    listed = [source.uri for shard in plan.listed for source in shard.objects]
    if not known or any(uri_id(uri) in known for uri in listed):
        return
    receipt = _newest_readable(store, plan)
    of_output = f", such as {receipt.shard.objects[0].uri}" if receipt is not None else ""
    first = f", such as {listed[0]}," if listed else ""
    raise InputError(
        f"none of the {len(listed)} listed inputs{first} is among the {len(known)} inputs of {store.root}{of_output}: this looks like "
        "the output of another corpus. Give the inputs of this output, or another output; if each night has other inputs: "
        "--accept-new-corpus, or nightly.new_corpus=accept"
    )


def check_fingerprint(store: Store, plan: BuildPlan) -> None:
    """Compares the fingerprint of this night with that of the newest receipt.

    Raises:
        ConfigError: they differ. The message names each value that changed, old -> new.
    """
    newest = _newest(plan)
    if newest is None or newest.fingerprint == plan.fingerprint:
        return
    receipt = _newest_readable(store, plan)
    changed = differences(receipt.fingerprint_parts, plan.fingerprint_parts) if receipt is not None else []
    named = "; ".join(changed[:NAMED]) or "the values before are not known"
    more = f"; and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    raise ConfigError(
        f"the fingerprint changed from {newest.fingerprint[:8]} to {plan.fingerprint[:8]} since the last run on {store.root}: {named}"
        f"{more}. {len(plan.todo)} shards of {len(plan.listed)} would be encoded. Restore these values, or say that the change is meant: "
        "--accept-new-fingerprint"
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`section.key: old -> new` of each value that differs between two sets of fingerprint parts, by name."""
    before, after = _flat(old), _flat(new)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name, ABSENT)} -> {after.get(name, ABSENT)}" for name in names]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            found[f"{prefix}{name}"] = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return found


def _newest(plan: BuildPlan) -> ReceiptSummary | None:
    return max(plan.receipts, key=lambda item: item.precedence, default=None)


def _newest_readable(store: Store, plan: BuildPlan) -> Receipt | None:
    newest = _newest(plan)
    return None if newest is None else Ledger(store).load(newest.key)
