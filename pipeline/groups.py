"""Which plain files make a virtual shard: written down once per output, so that no two runs ever group the same file differently.

Enters: the files a run has listed. Leaves: the shards that hold them, grouped as the first run that saw each file decided. A shard's
receipt is what makes its rows exist once; that only holds if everybody means the same files by the same shard, also while a folder grows
or two runs use other settings.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.errors import OutputError
from pipeline.records import Shard, SourceObject

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.storage import Store

PREFIX = "groups/"


def agreed_groups(
    store: Store, fingerprint: str, listed: Sequence[SourceObject], group: Callable[[list[SourceObject]], list[Shard]]
) -> list[Shard]:
    """Shards that together hold every listed file once; what nobody has grouped yet is grouped by `group` and written down.

    A shard may hold files that are not listed (gone, replaced, or outside this run's inputs); the caller looks.

    Raises:
        OutputError: a group list that cannot be read.
    """
    wanted = set(listed)
    while True:
        keys = [info.key for info in store.list(f"{PREFIX}{fingerprint}/")]
        known = [shard for key in keys for shard in _read(store, key)]
        held = {source for shard in known for source in shard.objects}
        fresh = [source for source in listed if source not in held]
        if not fresh:
            return [shard for shard in known if wanted & set(shard.objects)]
        text = json.dumps([asdict(shard) for shard in group(fresh)], indent=1)
        # Won or lost, the next turn reads what stands there: somebody else may have been first with other files.
        store.put_if_absent(f"{PREFIX}{fingerprint}/{len(keys):06d}.json", text.encode())


def _read(store: Store, key: str) -> list[Shard]:
    try:
        return [
            Shard(raw["kind"], raw["name"], tuple(SourceObject(**source) for source in raw["objects"]))
            for raw in json.loads(store.read(key))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{key} is no list of groups: {error}", uri=store.uri(key)) from error
