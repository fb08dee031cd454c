"""Which part of a shard an attempt covers: the samples of a retry, files that cannot be read, and where a long group of files ends.

In: what the reader, the feed and decoders report of samples and objects. Out: objects that the receipt covers, those that are left, clips
that an earlier receipt has. Used by the reading thread and by the feed's; no I/O but `load_earlier`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pipeline.engine.clip_id import clip_id
from pipeline.writer.index_file import read_index
from pipeline.writer.latent_row import storable

if TYPE_CHECKING:
    from pipeline.receipts import Ledger
    from pipeline.records import OpenedVideo, Reject, Sample, Shard, SourceObject
    from pipeline.storage import Store


class ShardScope:
    """See the module.

    Args:
        shard: as it was handed out.
        fingerprint: of the build.
        video_s: seconds of video after which a group of plain files ends; the files that are left become another shard.
    """

    def __init__(self, shard: Shard, fingerprint: str, video_s: float) -> None:
        self.shard = shard
        self.digests: dict[str, str] = {}  # by URI: BLAKE2b-128 in hex of the object's bytes
        self._fingerprint = fingerprint
        self._etags = {source.uri: source.etag for source in shard.objects}
        self._wanted = None if shard.retry is None else set(shard.retry.samples)
        self._earlier_ids: set[str] = set()
        self._earlier_samples: set[tuple[str, str]] = set()  # as rows spell them
        self._unread: dict[SourceObject, Exception] = {}
        self._video_s_left = video_s if shard.kind == "files" and shard.retry is None else float("inf")
        self._guard = threading.Lock()
        self._begun: set[str] = set()  # URIs of objects that were handed out or rejected
        self._enough = False

    # --- retries ------------------------------------------------------------------------------------------------------

    def load_earlier(self, ledger: Ledger, store: Store) -> None:
        """Of a retry: reads which clips of its samples the earlier receipts hold. Else does nothing."""
        retry = self.shard.retry
        wanted = {(storable(uri), storable(key)) for uri, key in retry.samples} if retry is not None else set()
        for shard_id in () if retry is None else retry.after:
            receipt = ledger.read(shard_id)
            for item in () if receipt is None else receipt.files:
                rows = read_index(store.read(item.index_key))[0]
                found = [row for row in rows if (row.source_uri, row.source_key) in wanted]
                self._earlier_ids.update(row.id for row in found)
                self._earlier_samples.update((row.source_uri, row.source_key) for row in found)

    def wants(self, item: Sample | Reject) -> bool:
        """Whether a sample or reject of the reader belongs to the attempt: in a retry, only those of its samples."""
        return self._wanted is None or (item.uri, item.key) in self._wanted

    def earlier_clips(self, sample: Sample, opened: OpenedVideo) -> set[int]:
        """Numbers of the clips that an earlier receipt holds."""
        if not self._earlier_ids:
            return set()
        etag = self._etags[sample.uri]
        return {
            plan.index for plan in opened.clips if clip_id(sample, etag, plan, self._fingerprint) in self._earlier_ids
        }

    def is_recovered(self, sample: Sample) -> bool:
        """Whether this is a sample of a retry of which no earlier receipt holds a clip."""
        return self._wanted is not None and (storable(sample.uri), storable(sample.key)) not in self._earlier_samples

    # --- objects ------------------------------------------------------------------------------------------------------

    def begin(self, uri: str | None) -> bool:
        """A sample of this object is handed out, or rejected by the reader. False: the group ended before it, it is left."""
        with self._guard:
            if uri is None or uri in self._begun:
                return True
            if not self._enough:
                self._begun.add(uri)
            return not self._enough

    def opened(self, sample: Sample, opened: OpenedVideo) -> None:
        """A decoder has opened a video: its length, and for a plain file its hash."""
        if self.shard.kind == "files":
            self.digests[sample.uri] = opened.info.content_hash
        with self._guard:
            self._video_s_left -= opened.info.duration_s
            self._enough = self._enough or self._video_s_left <= 0

    @property
    def enough(self) -> bool:
        """Whether the group ends here: no further object begins."""
        return self._enough

    def cannot_read(self, source: SourceObject, error: Exception) -> None:
        """The store refuses this object, or has another one by now. The receipt does not cover it: the next run tries it."""
        with self._guard:
            if not self._enough:  # else it is left like the others behind the end
                self._unread[source] = error

    def first_error(self) -> Exception | None:
        """Why the attempt fails because of unread objects: none could be read, or it is a retry, whose samples are settled together."""
        if not self._unread or (self.shard.retry is None and len(self._unread) < len(self.shard.objects)):
            return None
        return next(iter(self._unread.values()))

    @property
    def refused(self) -> tuple[str, ...]:
        """Objects that could not be read, each with its reason."""
        return tuple(f"{source.uri}: {getattr(error, 'message', error)}" for source, error in self._unread.items())

    def covered(self) -> tuple[SourceObject, ...]:
        """Objects that the receipt covers."""
        left = {*self._unread, *self.left()}
        return tuple(source for source in self.shard.objects if source not in left)

    def left(self) -> tuple[SourceObject, ...]:
        """Objects behind the end of the group: another shard's."""
        if not self._enough:
            return ()
        return tuple(
            source for source in self.shard.objects if source.uri not in self._begun and source not in self._unread
        )
