"""The part of a shard that an attempt covers: the samples of a retry, without files that cannot be read, up to the end of a long group.

Takes the reports of the reader, the feed and decoders about samples and objects. Gives the objects that the receipt covers, those that are
left, and the clips of an earlier receipt. Used by the reading thread and by the feed's. Only `load_earlier` and `source_bytes` do I/O.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.engine.worker.clip_id import clip_id
from pipeline.errors import StorageUnavailable
from pipeline.format.columns import storable
from pipeline.format.index import read_index
from pipeline.ledger.counted import shown
from pipeline.ledger.overlaps import Overlaps
from pipeline.ledger.summary import summarise
from pipeline.storage import ObjectInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.ledger.receipts import Ledger
    from pipeline.records import ClipPlan, OpenedVideo, Reject, Sample, Shard, SourceObject
    from pipeline.storage import Store

ASIDE_AT_MOST = 8  # objects of a group whose reading failed, before it is the store that fails


class ShardScope:
    """See the module.

    Args:
        shard: as the driver handed it out.
        fingerprint: of the build.
        video_s: seconds of video after which a group of plain files ends; the files that are left become another shard.
    """

    def __init__(self, shard: Shard, fingerprint: str, video_s: float) -> None:
        self.shard = shard
        self.digests: dict[str, str] = {}  # by URI: BLAKE2b-128 in hex of the object's bytes
        self._fingerprint = fingerprint
        self._versions = {source.uri: source.version for source in shard.objects}  # for the ids of latents
        etags = {source.uri: source.etag for source in shard.objects}
        self.fetched_etags = {**etags, **dict(shard.retry.etags if shard.retry is not None else ())}
        retried = () if shard.retry is None else shard.retry.samples
        self._wanted = None if shard.retry is None else {(sample.uri, sample.key) for sample in retried}
        self._file_bytes = {source.uri: source.size for source in shard.objects} if shard.kind == "files" else {}
        self._earlier_ids: set[str] = set()
        self._earlier_samples: set[tuple[str, str]] = set()  # as rows spell them
        self._unread: dict[SourceObject, Exception] = {}
        self._failed_reads: dict[SourceObject, Exception] = {}
        self._video_s_left = video_s if shard.kind == "files" and shard.retry is None else float("inf")
        self._guard = threading.Lock()
        self._begun: set[str] = set()  # URIs of objects that were handed out or rejected
        self._enough = False

    def fetched(self) -> Shard:
        """The shard to read. The objects of a retry may have other etags by now than those in the ids of their latents."""
        objects = tuple(replace(source, etag=self.fetched_etags[source.uri]) for source in self.shard.objects)
        return replace(self.shard, objects=objects)

    # --- retries ------------------------------------------------------------------------------------------------------

    def load_earlier(self, ledger: Ledger, store: Store) -> None:
        """For a retry: reads which clips of its samples count in the earlier receipts. Else does nothing."""
        retry = self.shard.retry
        if retry is None:
            return
        wanted = {(storable(sample.uri), storable(sample.key)) for sample in retry.samples}
        found = [receipt for shard in (retry.base, *retry.after) if (receipt := ledger.read(shard)) is not None]
        info = ObjectInfo("", 0, "", 0.0)
        overlaps = Overlaps(summarise(receipt, info) for receipt in found)
        for part in map(overlaps.counted, found):
            for item in part.receipt.files:
                for row in shown(part, read_index(store.read(item.index_key))[0]):
                    if (row.source_uri, row.source_key) in wanted:
                        self._earlier_ids.add(row.id)
                        self._earlier_samples.add((row.source_uri, row.source_key))

    def wants(self, item: Sample | Reject) -> bool:
        """Whether a sample or reject of the reader belongs to the attempt. In a retry only its samples do."""
        return self._wanted is None or (item.uri, item.key) in self._wanted

    def earlier_clips(self, sample: Sample, opened: OpenedVideo) -> set[int]:
        """Numbers of the clips that an earlier receipt holds, with all their variants: these are written together or not at all."""
        if not self._earlier_ids:
            return set()
        held = {plan.clip_index for plan in opened.clips if self.clip_id(sample, plan) in self._earlier_ids}
        return {plan.index for plan in opened.clips if plan.clip_index in held}

    def clip_id(self, sample: Sample, plan: ClipPlan) -> str:
        """Id of a latent, see `clip_id`."""
        return clip_id(sample, self._versions[sample.uri], plan, self._fingerprint)

    def recovered(self, encoded: Iterable[Sample]) -> tuple[tuple[str, str], ...]:
        """For a retry: encoded samples of which no earlier receipt holds a clip."""
        if self._wanted is None:
            return ()
        names = {(sample.uri, sample.key) for sample in encoded}
        return tuple(
            sorted(name for name in names if (storable(name[0]), storable(name[1])) not in self._earlier_samples)
        )

    def empty(self, encoded: Iterable[Sample]) -> tuple[str, ...]:
        """URIs of covered plain files that gave no clip, now or in an earlier receipt."""
        if self.shard.kind == "tar":
            return ()
        full = {sample.uri for sample in encoded}
        earlier = {uri for uri, _ in self._earlier_samples}
        uris = (source.uri for source in self.covered())
        return tuple(uri for uri in uris if uri not in full and storable(uri) not in earlier)

    # --- objects ------------------------------------------------------------------------------------------------------

    def begin(self, uri: str | None, then: Callable[[], None] = lambda: None) -> bool:
        """Called when a sample of this object is handed out, or rejected by the reader. False: the group has ended before the object.

        Otherwise `then` is called before the group can end, so that the receipt is made after it.
        """
        with self._guard:
            if self._enough and uri is not None and uri not in self._begun:
                return False
            if uri is not None:
                self._begun.add(uri)
            then()
            return True

    def opened(self, sample: Sample, opened: OpenedVideo) -> None:
        """Records the duration of an opened video, and the hash of a plain file."""
        if self.shard.kind == "files":
            self.digests[sample.uri] = opened.info.content_hash
        with self._guard:
            self._video_s_left -= opened.info.duration_s
            self._enough = self._enough or self._video_s_left <= 0

    def file_bytes(self, uri: str | None) -> int:
        """Size of a plain file of the shard; 0 for a tar, and for damage without an object."""
        return self._file_bytes.get(uri or "", 0)

    def source_bytes(self, sample: Sample) -> int:
        """Bytes of a sample in its source: a whole plain file, or its encoded video in a tar."""
        if self.shard.kind == "files":
            return self.file_bytes(sample.uri)
        if isinstance(sample.video, bytes):
            return len(sample.video)
        try:
            return os.path.getsize(sample.video)
        except OSError:  # the decoder will report it
            return 0

    @property
    def enough(self) -> bool:
        """Whether the group ends here: no further object begins."""
        return self._enough

    def cannot_read(self, source: SourceObject, error: Exception) -> None:
        """The store refuses this object, or it was replaced. The receipt does not cover it; the next run tries it again."""
        with self._guard:
            if not self._enough:  # else it is left, like all after the end of the group
                self._unread[self._listed(source)] = error

    def set_aside(self, uri: str, error: Exception) -> bool:
        """Excludes an object whose reading failed. False where the attempt must fail with `error` instead.

        An object that always fails must not fail the others of its group. It becomes a shard of its own, whose failures count for that
        object only. An object that was refused or replaced is left for the next run.
        """
        with self._guard:
            sources = [source for source in self.shard.objects if source.uri == uri]
            others = [
                source
                for source in self.shard.objects
                if source.uri != uri
                and source not in self._unread
                and source not in self._failed_reads
                and (not self._enough or source.uri in self._begun)
            ]
            if len(self._failed_reads) >= ASIDE_AT_MOST:
                return False
            if self.shard.kind != "files" or self.shard.retry is not None or not sources or not others:
                return False
            if not self._enough or uri in self._begun:  # else it is left, like all after the end of the group
                found = self._failed_reads if isinstance(error, StorageUnavailable) else self._unread
                found[sources[0]] = error
            return True

    def aside(self) -> tuple[SourceObject, ...]:
        """Objects whose reading failed: each becomes a shard of its own."""
        return tuple(self._failed_reads)

    def _listed(self, fetched: SourceObject) -> SourceObject:
        return next(source for source in self.shard.objects if source.uri == fetched.uri)

    def first_error(self) -> Exception | None:
        """The error of unread objects that fails the attempt: no object could be read, or it is a retry, which is settled as a whole."""
        errors = [*self._failed_reads.values(), *self._unread.values()]
        if not errors or (self.shard.retry is None and len(errors) < len(self.shard.objects)):
            return None
        return errors[0]

    @property
    def refused(self) -> tuple[str, ...]:
        """Objects that could not be read, each with its reason."""
        return tuple(f"{source.uri}: {getattr(error, 'message', error)}" for source, error in self._unread.items())

    def covered(self) -> tuple[SourceObject, ...]:
        """Objects that the receipt covers."""
        left = {*self._unread, *self._failed_reads, *self.left()}
        return tuple(source for source in self.shard.objects if source not in left)

    def left(self) -> tuple[SourceObject, ...]:
        """Objects after the end of the group: they become another shard."""
        if not self._enough:
            return ()
        read = {*self._unread, *self._failed_reads}
        return tuple(source for source in self.shard.objects if source.uri not in self._begun and source not in read)
