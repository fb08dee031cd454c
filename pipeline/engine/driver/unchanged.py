"""Inputs with a new modification time or etag and the same bytes as before: found by hash, and recorded in receipts.

Takes pending sources whose older version is encoded. Returns those with identical bytes. Their receipts have no files: the rows of the
older version remain the rows of the input, and the next run need not hash it again.
"""

from __future__ import annotations

import hashlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.errors import AccessError, NotFound, SourceChanged
from pipeline.ledger.receipts import Ledger
from pipeline.records import Counts, Receipt, Shard, SourceObject, Timings
from pipeline.storage import open_source

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.storage import Store

BLOCK_BYTES = 1024 * 1024
WORKERS = 8
SOURCES_PER_RECEIPT = 1000


def find_unchanged(
    store: Store, touched: dict[SourceObject, list[ReceiptSummary]], job: EncodeJob
) -> dict[SourceObject, ReceiptSummary]:
    """For each source with the same bytes as an older version, the receipt of that version. Reads objects of the same size only.

    An object that cannot be read now is left to the attempt that will encode it.
    """
    older = {item.key: item for items in touched.values() for item in items}
    known: dict[str, dict[tuple[int, str, str], ReceiptSummary]] = {}  # uri -> (size, annotations, digest) -> receipt
    for item, receipt in zip(older.values(), Ledger(store).read_all([key] for key in older), strict=True):
        if receipt is not None:
            facts = {source.uri: (source.size, source.annotations) for source in receipt.shard.objects}
            for uri, digest in receipt.digests.items():
                known.setdefault(uri, {}).setdefault((*facts[uri], digest), item)
    same_size = [
        source
        for source in touched
        if any(facts[:2] == (source.size, source.annotations) for facts in known.get(source.uri, ()))
    ]
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="hash") as pool:
        digests = list(pool.map(lambda source: _digest(source, job), same_size))
    found = {
        source: known[source.uri].get((source.size, source.annotations, digest or ""))
        for source, digest in zip(same_size, digests, strict=True)
    }
    return {source: item for source, item in found.items() if item is not None}


def record_unchanged(store: Store, unchanged: dict[SourceObject, ReceiptSummary], context: BuildContext) -> None:
    """Commits receipts without files for these sources."""
    ledger = Ledger(store)
    ordered = sorted(unchanged, key=lambda source: source.uri)
    for at in range(0, len(ordered), SOURCES_PER_RECEIPT):
        shard = Shard("files", "unchanged", tuple(ordered[at : at + SOURCES_PER_RECEIPT]))
        receipt = Receipt(
            format_version=ledger.layout.version,
            shard_id=shard.id(context.fingerprint),
            shard=shard,
            fingerprint=context.fingerprint,
            fingerprint_parts=context.fingerprint_parts,
            attempt=secrets.token_hex(4),
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            files=(),
            counts=Counts(),
            rejects=(),
            stats=None,
            timings=Timings(),
            limits=context.job.limits(),
            same_as={source.uri: unchanged[source].shard_id for source in shard.objects},
        )
        ledger.commit(receipt)


def _digest(source: SourceObject, job: EncodeJob) -> str | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_source(source, job.storage) as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
    except (NotFound, SourceChanged, AccessError):
        return None
    return digest.hexdigest()
