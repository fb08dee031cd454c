"""Settings under which an output already holds inputs of a build: which values differ, for the user.

Takes newest receipts by fingerprint and a context; reads one receipt for each fingerprint.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.ledger.receipts import Ledger
from pipeline.units import quantity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.storage import Store

NAMED = 8  # differences in a line
LONGEST = 60  # characters of a value
ABSENT = "(none)"


def other_settings_notices(
    others: Mapping[str, list[ReceiptSummary]], store: Store, context: BuildContext
) -> list[str]:
    """A line for each other fingerprint under which receipts have inputs that this build encodes."""
    ledger, lines = Ledger(store, layout=context.layout), []
    for fingerprint, receipts in sorted(others.items()):
        receipt = ledger.load(max(receipts, key=lambda item: item.precedence).key)
        changed = [] if receipt is None else differences(receipt.fingerprint_parts, context.fingerprint_parts)
        shards = quantity(len(receipts), "shard of these inputs was", "shards of these inputs were")
        lines.append(
            f"{shards} encoded before with other settings (fingerprint {fingerprint[:8]}, this run {context.fingerprint[:8]}): "
            f"{named(changed)}. They are encoded again in addition; `lathe publish --fingerprint {context.fingerprint[:8]}` publishes only "
            "the new ones"
        )
    return lines


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`section.key: old -> new` of each value that differs between two sets of fingerprint parts, by name."""
    before, after = _flat(old), _flat(new)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name, ABSENT)} -> {after.get(name, ABSENT)}" for name in names]


def named(changed: list[str]) -> str:
    """The first of these differences as text."""
    more = f"; and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    return ("; ".join(changed[:NAMED]) or "the values before are not known") + more


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            found[f"{prefix}{name}"] = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return found
