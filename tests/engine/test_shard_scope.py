"""The part of a shard that an attempt covers: whole groups, groups that end early, unreadable files, retries."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.engine.worker.shard_scope import ShardScope
from pipeline.errors import AccessError, SourceRefused, StorageUnavailable
from pipeline.records import Bucket, ClipPlan, OpenedVideo, Reject, RetriedSample, Retry, Sample, Shard, SourceObject

FILES = tuple(SourceObject(f"/v/{name}.mp4", 10, "e") for name in "abcd")


def scope_of(video_s=1800.0, retry=None, kind="files", objects=FILES):
    return ShardScope(Shard(kind, "s", objects, retry), "f" * 32, video_s)


def retry_of(*samples):
    return Retry("x" * 32, "attempt", tuple(RetriedSample(uri, key, False, 0) for uri, key in samples), ())


def sample_of(name, uri=None):
    return Sample(name, 0, uri or f"/v/{name}.mp4", b"", "mp4")


def opened(seconds):
    return OpenedVideo(SimpleNamespace(duration_s=seconds, content_hash="h"), (), ())


def names(sources):
    return "".join(source.uri[3] for source in sources)


def test_a_group_that_ends_early_covers_what_began_and_leaves_the_rest():
    scope = scope_of(video_s=10.0)
    assert scope.begin("/v/a.mp4")
    scope.opened(sample_of("a"), opened(6.0))
    assert scope.begin("/v/b.mp4")
    scope.opened(sample_of("b"), opened(6.0))
    assert scope.enough
    assert not scope.begin("/v/c.mp4")
    assert scope.begin("/v/b.mp4")  # decoded again after its decoder died
    scope.cannot_read(FILES[3], AccessError("denied"))  # read ahead of the end: left, not refused
    assert (names(scope.covered()), names(scope.left()), scope.refused) == ("ab", "cd", ())


def test_a_refused_file_is_neither_covered_nor_left():
    scope = scope_of()
    for name in "abd":
        assert scope.begin(f"/v/{name}.mp4")
    scope.cannot_read(FILES[2], AccessError("denied"))
    assert (names(scope.covered()), scope.left()) == ("abd", ())
    assert scope.refused == ("/v/c.mp4: denied",)
    assert scope.first_error() is None


def test_shard_without_a_readable_object_fails():
    scope = scope_of(objects=FILES[:1])
    scope.cannot_read(FILES[0], AccessError("denied"))
    assert str(scope.first_error()) == "denied"


def test_a_retry_with_an_unreadable_file_fails_as_a_whole():
    """Its receipt replaces the rejects of all its samples, so it must have looked at each of them."""
    scope = scope_of(retry=retry_of(("/v/a.mp4", "a"), ("/v/b.mp4", "b")))
    scope.cannot_read(FILES[1], AccessError("denied"))
    assert str(scope.first_error()) == "denied"


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_long_videos_end_only_groups_of_plain_files(kind):
    scope = scope_of(video_s=1.0, kind=kind, objects=FILES[:1])
    scope.begin("/v/a.mp4")
    scope.opened(sample_of("a"), opened(100.0))
    assert scope.enough == (kind == "files")
    assert scope.covered() == FILES[:1]


def test_retry_reads_only_its_samples():
    retry = retry_of(("/v/a.mp4", "x"))
    scope = scope_of(retry=retry, kind="tar", objects=FILES[:1])
    assert scope.wants(sample_of("x", "/v/a.mp4"))
    assert not scope.wants(sample_of("y", "/v/a.mp4"))
    assert not scope.wants(Reject(None, "read", "truncated_shard", "cut", policy=False, uri="/v/a.mp4"))
    assert scope.recovered([sample_of("x", "/v/a.mp4")]) == (("/v/a.mp4", "x"),)


def test_failing_object_is_set_aside_while_others_are_left():
    scope = scope_of()
    assert scope.set_aside("/v/b.mp4", StorageUnavailable("EIO"))
    assert scope.set_aside("/v/c.mp4", SourceRefused("EACCES"))
    assert (names(scope.covered()), names(scope.aside()), scope.refused) == ("ad", "b", ("/v/c.mp4: EACCES",))
    assert scope.set_aside("/v/a.mp4", StorageUnavailable("EIO"))
    assert not scope.set_aside("/v/d.mp4", StorageUnavailable("EIO"))
    assert scope.first_error() is None
    scope.cannot_read(FILES[3], AccessError("denied"))
    assert scope.first_error().message == "EIO"


def test_retries_tars_and_single_files_are_never_set_aside():
    error = StorageUnavailable("EIO")
    assert not scope_of(retry=retry_of(("/v/a.mp4", "a"))).set_aside("/v/a.mp4", error)
    assert not scope_of(kind="tar", objects=FILES[:1]).set_aside("/v/a.mp4", error)
    assert not scope_of(objects=FILES[:1]).set_aside("/v/a.mp4", error)


def test_the_only_object_before_the_end_of_a_group_is_not_set_aside():
    scope = scope_of(video_s=1.0)
    scope.begin("/v/a.mp4")
    scope.opened(sample_of("a"), opened(6.0))
    assert scope.enough
    assert not scope.set_aside("/v/a.mp4", StorageUnavailable("EIO"))


def test_many_failing_objects_fail_the_attempt():
    files = tuple(SourceObject(f"/v/{n}.mp4", 10, "e") for n in range(20))
    scope = scope_of(objects=files)
    assert [scope.set_aside(source.uri, StorageUnavailable("EIO")) for source in files] == [True] * 8 + [False] * 12


def test_a_retry_takes_the_variants_of_a_clip_together():
    """Of a clip whose flip was taken down, the flip is not encoded again: it would be alone in a file."""
    scope = scope_of(retry=retry_of(("/v/a.mp4", "a")))
    size = Bucket(5, 32, 32)
    plans = tuple(
        ClipPlan(n, n // 2, size, 8.0, n // 2 / 8, 32, 32, 0, 0, variant=variant, variants=2)
        for n, variant in enumerate(("base", "flip") * 2)
    )
    video = OpenedVideo(SimpleNamespace(duration_s=1.0, content_hash="h"), plans, ())
    assert scope.earlier_clips(sample_of("a"), video) == set()
    scope._earlier_ids.add(scope.clip_id(sample_of("a"), plans[2]))
    assert scope.earlier_clips(sample_of("a"), video) == {2, 3}
