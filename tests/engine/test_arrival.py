"""Video of a decoder on another machine: the complete bytes of the listed object, or StorageUnavailable."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from pipeline.config import StorageConfig
from pipeline.engine.decoders.arrival import Arrival
from pipeline.errors import SourceChanged, StorageUnavailable
from pipeline.storage import stat_uri

MiB = 1 << 20
CONFIG = StorageConfig(part_bytes=64 * 1024, spool_bytes=MiB)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(os.urandom(3 * MiB + 7))
    return str(path), stat_uri(str(path), CONFIG).etag


@pytest.fixture
def arrival():
    made = Arrival()
    yield made
    made.drop()


@pytest.mark.parametrize("size", [1, 64 * 1024, 64 * 1024 + 1, MiB])
def test_small_video_is_fetched_to_memory(arrival, source, size):
    uri, etag = source
    arrival.fetch(uri, etag, (513, size), CONFIG)
    assert arrival.video == Path(uri).read_bytes()[513 : 513 + size]


def test_large_video_is_fetched_to_a_temporary_file_that_drop_deletes(arrival, source):
    uri, etag = source
    arrival.fetch(uri, etag, (513, 2 * MiB), CONFIG)
    assert Path(arrival.video).read_bytes() == Path(uri).read_bytes()[513 : 513 + 2 * MiB]
    path = arrival.video
    arrival.fetch(uri, etag, (0, 10), CONFIG)
    assert not os.path.exists(path)


def test_replaced_object_is_refused(arrival, source):
    uri, etag = source
    with pytest.raises(SourceChanged):
        arrival.fetch(uri, "another", (0, 10), CONFIG)
    os.unlink(uri)
    with pytest.raises(SourceChanged, match="but was listed"):
        arrival.fetch(uri, etag, (0, 10), CONFIG)


def test_short_range_read_raises_storage_unavailable(arrival, source):
    uri, etag = source
    with pytest.raises(StorageUnavailable, match="got 10 of 20"):
        arrival.fetch(uri, etag, (3 * MiB - 3, 20), CONFIG)


def test_pieces_are_joined_in_order_and_a_first_piece_starts_a_new_video(arrival):
    for n, piece in enumerate([b"one", b"two", b"three"]):
        arrival.append(piece, first=n == 0)
    path = arrival.video
    assert Path(path).read_bytes() == b"onetwothree"
    arrival.append(b"new", first=True)
    assert Path(arrival.video).read_bytes() == b"new"
    assert not os.path.exists(path)


@pytest.mark.parametrize("way", ["fetch", "append"])
def test_unwritable_temporary_folder_raises_storage_unavailable(arrival, source, monkeypatch, way):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(StorageUnavailable, match="No space left on device; free space there, or set TMPDIR"):
        arrival.fetch(*source, (0, 2 * MiB), CONFIG) if way == "fetch" else arrival.append(b"x", first=True)
