"""`ReceiptSummary`: the facts of one receipt that a resumed run needs, with hashes in place of sources."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from pipeline.format.columns import storable
from pipeline.records import Retry, SourceObject, retry_from_dict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.records import Receipt
    from pipeline.storage import ObjectInfo

ID_BYTES = 16
URI_BYTES = 8
DAMAGED, EMPTY = 1, 2
UNKNOWN_CONTENT = bytes(ID_BYTES)


@dataclass(frozen=True, slots=True)
class ReceiptSummary:
    """Summary of one receipt object. Sources are hashes: a corpus may have millions, and they are only compared."""

    key: str
    size: int
    etag: str
    shard_id: str
    fingerprint: str
    created: str
    attempt: str
    sources: bytes = field(repr=False)  # `source_id` of each object, concatenated
    uris: bytes = field(repr=False)  # `uri_id` of each object, concatenated
    contents: bytes = field(repr=False)  # `content_id` of each object, concatenated
    retry: str | None  # JSON of `Retry`
    same_as: str | None  # JSON: for each object the shard of an older version with equal bytes, see `Receipt.same_as`
    container: str  # "parquet", "tar", or "" if nothing was written
    samples: int  # these four as `Receipt.added`
    clips: int
    damaged: int
    damaged_regions: int
    marks: bytes = field(repr=False)  # of plain files, for each object the sum of DAMAGED and EMPTY
    reasons: str  # JSON: rejects by reason
    limits: str  # JSON: see `Receipt.limits`

    def __post_init__(self) -> None:
        # Mostly equal over 100,000 receipts: stored once.
        for name in ("fingerprint", "container", "reasons", "limits"):
            object.__setattr__(self, name, sys.intern(getattr(self, name)))

    @property
    def precedence(self) -> tuple[str, str]:
        """As `receipts.precedence`."""
        return self.created, self.attempt

    def source_ids(self) -> list[bytes]:
        """`source_id` of each object."""
        return [self.sources[at : at + ID_BYTES] for at in range(0, len(self.sources), ID_BYTES)]

    def content_ids(self) -> list[bytes]:
        """`content_id` of each object."""
        return [self.contents[at : at + ID_BYTES] for at in range(0, len(self.contents), ID_BYTES)]

    def uri_ids(self) -> list[bytes]:
        """`uri_id` of each object."""
        return [self.uris[at : at + URI_BYTES] for at in range(0, len(self.uris), URI_BYTES)]

    def source_of_uri(self) -> dict[bytes, bytes]:
        """`source_id` of the objects, by `uri_id`."""
        return dict(zip(self.uri_ids(), self.source_ids(), strict=True))

    def positions(self) -> dict[bytes, int]:
        """Positions of the objects, by `uri_id`."""
        return {uri: position for position, uri in enumerate(self.uri_ids())}

    def retried(self) -> Retry | None:
        """The retry, if this is the receipt of one."""
        if self.retry is None:
            return None
        return retry_from_dict(json.loads(self.retry))


def source_id(source: SourceObject) -> bytes:
    """16-byte hash of URI, size, etag and annotations."""
    text = f"{source.uri}\0{source.size}\0{source.version}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=ID_BYTES).digest()


def content_id(source: SourceObject, digest: str | None) -> bytes:
    """16-byte hash of URI, size, digest of the bytes and annotations; zeros if the digest is unknown."""
    if digest is None:
        return UNKNOWN_CONTENT
    text = f"{source.uri}\0{source.size}\0{digest}{source.annotations}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=ID_BYTES).digest()


def uri_id(uri: str) -> bytes:
    """8-byte hash of a URI, as spelled in receipts or in rows."""
    return hashlib.blake2b(storable(uri).encode(), digest_size=URI_BYTES).digest()


def summarise(receipt: Receipt, info: ObjectInfo) -> ReceiptSummary:
    """Summary of a receipt; `info`: its object."""
    retry, added = receipt.shard.retry, receipt.added()
    return ReceiptSummary(
        key=info.key,
        size=info.size,
        etag=info.etag,
        shard_id=receipt.shard_id,
        fingerprint=receipt.fingerprint,
        created=receipt.created,
        attempt=receipt.attempt,
        sources=b"".join(map(source_id, receipt.shard.objects)),
        uris=b"".join(uri_id(source.uri) for source in receipt.shard.objects),
        contents=b"".join(content_id(source, receipt.digests.get(source.uri)) for source in receipt.shard.objects),
        retry=None if retry is None else json.dumps(asdict(retry)),
        same_as=json.dumps([receipt.same_as[source.uri] for source in receipt.shard.objects])
        if receipt.same_as
        else None,
        container=receipt.files[0].key.rpartition(".")[2] if receipt.files else "",
        samples=added.samples,
        clips=added.clips,
        damaged=added.damaged,
        damaged_regions=added.damaged_regions,
        marks=_marks(receipt),
        reasons=json.dumps(Counter(reject.reason for reject in receipt.rejects)),
        limits=json.dumps(receipt.limits, sort_keys=True),
    )


def _marks(receipt: Receipt) -> bytes:
    if receipt.shard.kind == "tar":
        return b""
    damaged, empty = {reject.uri for reject in receipt.rejects if not reject.policy}, set(receipt.empty)
    return bytes(DAMAGED * (source.uri in damaged) + EMPTY * (source.uri in empty) for source in receipt.shard.objects)


def first_of_each_shard(found: Iterable[ReceiptSummary]) -> list[ReceiptSummary]:
    """Of several receipts of one shard, the one that counts."""
    first: dict[str, ReceiptSummary] = {}
    for item in found:
        if item.shard_id not in first or item.precedence < first[item.shard_id].precedence:
            first[item.shard_id] = item
    return list(first.values())
