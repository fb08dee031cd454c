"""What a snapshot shows and what it ought to show, the second read from receipts by brute force, for tests of publishing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config import WriteConfig
from pipeline.format.index import read_index
from pipeline.ledger.counted import counted_receipts, shown
from pipeline.ledger.receipts import Ledger, precedence
from pipeline.ledger.snapshots import Snapshot, Snapshots
from pipeline.ledger.takedowns import read_takedowns
from pipeline.operate.publish import PublishOptions, publish
from pipeline.records import Receipt, SourceObject
from pipeline.storage import Store
from tests.pipeline.latent_clips import latent_clip, write_shard


def add_shards(store: Store, folder: Path, numbers: range, **changes: object) -> list[Receipt]:
    """Commits shards of two real clips each."""
    made = []
    for number in numbers:
        clips = [latent_clip(100 * number + n, uri=f"s3://corpus/shard-{number:03d}.tar") for n in range(2)]
        receipt = write_shard(store, folder / "spool", WriteConfig(), clips, shard=number)
        made.append(Ledger(store).commit(replace(receipt, **changes)))
    return made


def publish_all(store: Store, **options: object) -> Snapshot:
    """The newest snapshot after publishing what there is."""
    Ledger(store).prepare("films")
    listing = options.pop("listing", None)
    return publish(store, PublishOptions(**options), listing=listing).snapshot


def shown_ids(store: Store, snapshot: Snapshot) -> list[str]:
    """Ids of the rows of a snapshot, as a reader finds them: manifest, indexes, takedowns; sorted."""
    takedowns = read_takedowns(store)
    found = []
    for row in Snapshots(store).table(snapshot, "files").to_pylist():
        rows = read_index(store.read(row["index_key"]))[0]
        counted = [item for item in rows if item.row not in row["hidden"]]
        assert (len(counted), len(rows)) == (row["rows"], row["file_rows"])
        assert sum(item.num_frames for item in counted) == row["frames"]
        found += [item.id for item in counted if not takedowns.hides(item)]
    return sorted(found)


def newest_contents(store: Store, fingerprint: str) -> dict[str, str]:
    """By URI: digest of the bytes that the newest receipt of it is about."""
    receipts = {item.shard_id: item for item in Ledger(store).all() if item.fingerprint == fingerprint}
    found = {}
    for receipt in sorted(receipts.values(), key=precedence):
        for source in receipt.shard.objects if receipt.shard.retry is None else ():
            about = receipt
            while about.same_as:
                about = receipts[about.same_as[source.uri]]
            found[source.uri] = about.digests[source.uri]
    return found


def expected_ids(store: Store, contents: dict[str, dict[str, str | None]]) -> list[str]:
    """Ids of rows that receipts hold of these versions of inputs (fingerprint -> URI -> digest), without what was taken down; sorted."""
    found = []
    for part in counted_receipts(store):  # without takedowns and duplicates
        versions = contents.get(part.receipt.fingerprint, {})
        for item in () if part.superseded else part.receipt.files:
            rows = shown(part, read_index(store.read(item.index_key))[0])
            found += [row.id for row in rows if versions.get(row.source_uri) == row.source_hash]
    return sorted(found)


def listed(workspace: object) -> list[SourceObject]:
    """The inputs as they are now."""
    found = []
    for path in sorted(workspace.folder.glob("*.mp4")):
        stat = path.stat()
        found.append(SourceObject(str(path), stat.st_size, f"{stat.st_mtime_ns}-{stat.st_size}"))
    return found
