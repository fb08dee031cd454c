"""Main videos of plain files that are paired videos of another one, by the name of the member, as receipts record them.

Receipts know a member only beside its main video, whose name follows from that of the member by the `members` of the job: these names are
looked up by their hashes, and the receipts that have one are read.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.summary import uri_id
from pipeline.ledger.summary_tables import rows_naming
from pipeline.process.scratch import ScratchFolder
from pipeline.records import MAIN, VIDEO_EXTENSIONS, MemberRule

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow as pa

    from pipeline.storage import Store


def mains_of(store: Store, uris: Iterable[str]) -> dict[str, list[str]]:
    """URIs of main videos that have these plain files as members in some receipt, by URI of the member; without files that are none.

    Raises:
        OutputError: a receipt of another format version.
    """
    videos = [uri for uri in uris if uri.lower().endswith(tuple(f".{suffix}" for suffix in VIDEO_EXTENSIONS))]
    if not videos:
        return {}
    with ScratchFolder() as folder:
        table = read_table(Summaries(store).spool(folder / "summaries"), ["key", "fingerprint", "uris"])
    rules = _rules(store, table)
    candidates = {uri: {main for rule in rules for main in _possible(uri, rule)} for uri in videos}
    wanted = {uri_id(main) for mains in candidates.values() for main in mains}
    if not wanted:
        return {}
    keys = table.take(rows_naming(table, wanted))["key"].to_pylist()
    found: dict[str, list[str]] = {}
    for receipt in Ledger(store).read_all([key] for key in keys):
        for source in receipt.shard.objects if receipt is not None else ():
            for member in source.members:
                if member.uri in candidates and source.uri not in found.setdefault(member.uri, []):
                    found[member.uri].append(source.uri)
    return found


def _rules(store: Store, table: pa.Table) -> set[MemberRule]:
    """What the jobs of an output call members: from one receipt of each fingerprint."""
    first = table.group_by("fingerprint").aggregate([("key", "min")])["key_min"].to_pylist()
    receipts = Ledger(store).read_all([key] for key in first)
    return {rule for receipt in receipts if receipt is not None and (rule := MemberRule.of(receipt.fingerprint_parts))}


def _possible(uri: str, rule: MemberRule) -> list[str]:
    """Names that the main video of a member may have."""
    stem, name = rule.place(uri, os.path.splitext(uri)[0]) or ("", MAIN)
    if name == MAIN:
        return []
    suffixes = (rule.video,) if rule.video else VIDEO_EXTENSIONS
    return [f"{stem}.{suffix}" for suffix in (*suffixes, *map(str.upper, suffixes))]
