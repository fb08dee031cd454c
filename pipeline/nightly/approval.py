"""Refusal of a night before anything is encoded: another corpus than the output's, or settings that changed since its last receipt.

Takes the plan of the build and the store of the output. Reads one receipt, and only for a refusal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.driver.other_settings import differences, named
from pipeline.errors import ConfigError, InputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summary import uri_id

if TYPE_CHECKING:
    from pipeline.engine.driver.budget import BuildPlan
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.records import Receipt
    from pipeline.storage import Store


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
    raise ConfigError(
        f"the fingerprint changed from {newest.fingerprint[:8]} to {plan.fingerprint[:8]} since the last run on {store.root}: "
        f"{named(changed)}. {len(plan.todo)} shards of {len(plan.listed)} would be encoded. Restore these values, or say that the change "
        "is meant: "
        "--accept-new-fingerprint"
    )


def _newest(plan: BuildPlan) -> ReceiptSummary | None:
    return max(plan.receipts, key=lambda item: item.precedence, default=None)


def _newest_readable(store: Store, plan: BuildPlan) -> Receipt | None:
    newest = _newest(plan)
    return None if newest is None else Ledger(store).load(newest.key)
