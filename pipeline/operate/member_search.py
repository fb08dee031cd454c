"""Main videos of plain files that are paired videos of another one, by the name of the member, as receipts record them.

Receipts know a member only beside its main video, whose name begins as the member's does: these names are looked up by their hashes, and
the receipts that have one are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.ledger.manifest import read_table
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.summary import uri_id
from pipeline.ledger.summary_tables import rows_naming
from pipeline.process.scratch import ScratchFolder
from pipeline.records import VIDEO_EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.storage import Store


def mains_of(store: Store, uris: Iterable[str]) -> dict[str, list[str]]:
    """URIs of main videos that have these plain files as members in some receipt, by URI of the member; without files that are none.

    Raises:
        OutputError: a receipt of another format version.
    """
    candidates = {uri: _possible(uri) for uri in uris}
    wanted = {uri_id(main) for mains in candidates.values() for main in mains}
    if not wanted:
        return {}
    with ScratchFolder() as folder:
        table = read_table(Summaries(store).spool(folder / "summaries"), ["key", "uris"])
    keys = table.take(rows_naming(table, wanted))["key"].to_pylist()
    found: dict[str, list[str]] = {}
    for receipt in Ledger(store).read_all([key] for key in keys):
        for source in receipt.shard.objects if receipt is not None else ():
            for member in source.members:
                if member.uri in candidates and source.uri not in found.setdefault(member.uri, []):
                    found[member.uri].append(source.uri)
    return found


def _possible(uri: str) -> list[str]:
    """Names that the main video of a member may have: the member's path up to one of its dots, with the suffix of a video."""
    folder, slash, base = uri.rpartition("/")
    parts = base.split(".")
    if len(parts) < 3 or parts[-1].lower() not in VIDEO_EXTENSIONS:
        return []
    stems = (".".join(parts[:count]) for count in range(1, len(parts) - 1))
    ends = (*VIDEO_EXTENSIONS, *map(str.upper, VIDEO_EXTENSIONS))
    return [f"{folder}{slash}{stem}.{end}" for stem in stems for end in ends]
