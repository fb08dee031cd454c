"""I/O errors of a video's file are storage errors in every phase of decoding."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.errors import BadDataError, LatheError, SourceChanged, SourceRefused, StorageUnavailable
from pipeline.records import Sample, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.decode import encoded_file, open_video
from tests.pipeline.test_decode_hostile import harm
from tests.video_files import encode, textured

RULES = resolve_rules(validate(ClipConfig, {"select": "tile", "frames": 5, "size": "32x32"}), 4, 8, "test")
CONTAINERS = ("mp4", "matroska", "mpegts", "avi")
PASSING = ("ESTALE", "EIO", "ETIMEDOUT", "EREMOTEIO", "EAGAIN", "ENODEV", "ENOTCONN", "EBUSY", "ENOMEM", "EMFILE")
MEANING = {
    **dict.fromkeys(PASSING, StorageUnavailable),
    **dict.fromkeys(("ENOENT", "ENOTDIR"), SourceChanged),
    **dict.fromkeys(("EACCES", "EPERM"), SourceRefused),
}
# Phase -> how often the file was opened before, and which share of it can be read then; None: it cannot be opened.
# It is opened to be hashed, to see whether it is encrypted, to list its packets, and to be decoded.
PHASES = {
    "hash open": (0, None),
    "hash": (0, 0.5),
    "encryption open": (1, None),
    "encryption": (1, 0.0),
    "header open": (2, None),
    "header": (2, 0.0),
    "demux": (2, 0.6),
    "demux end": (2, 0.95),
    "decode open": (3, None),
    "decode header": (3, 0.0),
    "decode": (3, 0.6),
    "decode end": (3, 0.75),  # of 24 frames, 20 are cut
}


class Sick:
    """A raw file that fails from byte `healthy` on."""

    def __init__(self, raw: Any, error: OSError, healthy: float) -> None:
        self._raw, self._error, self._healthy = raw, error, healthy
        self.seek, self.tell, self.close = raw.seek, raw.tell, raw.close

    def read(self, size: int = -1) -> bytes:
        if self._raw.tell() + size > self._healthy:
            raise self._error
        return bytes(self._raw.read(size))


def sicken(monkeypatch: pytest.MonkeyPatch, error: OSError, opened_before: int, share: float | None) -> None:
    opens = []

    def sick_open(path: str, *arguments: Any, **options: Any) -> Any:
        opens.append(path)
        if len(opens) != opened_before + 1:
            return open(path, *arguments, **options)
        if share is None:
            raise error
        return Sick(open(path, *arguments, **options), error, share * os.path.getsize(path))

    monkeypatch.setattr(encoded_file, "open", sick_open, raising=False)


def cut(video: bytes | str) -> list[Any]:
    """All answers of a cutter; the last is the error it raises, if any."""
    limits = validate(DecodeConfig, {})
    cutter = Cutter(CutRequest(Sample("key", 0, "uri", video, "mp4"), RULES, limits, 4, validate(DrillConfig, {})))
    answers: list[Any] = []
    try:
        answers.append(cutter.open())
        while not isinstance(answers[-1], VideoEnded):
            answers.append(cutter.next())
    except LatheError as error:
        answers.append(error)
    finally:
        cutter.close()
    return answers


def noise(index: int, width: int, height: int) -> np.ndarray:
    """Planar YUV 4:2:0 that no codec makes small."""
    return np.random.default_rng(index).integers(16, 235, (height * 3 // 2, width), np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Larger than a megabyte: libav reads 256 kB at a time."""
    folder = tmp_path_factory.mktemp("videos")
    found = {}
    for container in CONTAINERS:
        codec, options = (
            ("mpeg4", {"qscale": "1"}) if container == "avi" else ("libx264", {"preset": "ultrafast", "crf": "0"})
        )
        data = encode(24, codec=codec, container=container, options=options, picture=noise, size=(320, 320))
        assert len(data) > 1 << 20
        found[container] = str(folder / container)
        Path(found[container]).write_bytes(data)
    return found


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_failing_read_is_a_storage_error_in_every_phase(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, container: str, phase: str
) -> None:
    sicken(monkeypatch, OSError(errno.ESTALE, os.strerror(errno.ESTALE)), *PHASES[phase])
    *_, last = cut(files[container])
    assert type(last) is StorageUnavailable
    assert files[container] in str(last)
    assert "Stale file handle" in str(last)


@pytest.mark.parametrize("name", MEANING)
@pytest.mark.parametrize("phase", ["hash open", "hash", "demux", "decode"])
def test_the_system_error_decides_the_storage_error(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, phase: str
) -> None:
    code = getattr(errno, name)
    sicken(monkeypatch, OSError(code, os.strerror(code)), *PHASES[phase])
    *before, last = cut(files["mp4"])
    assert type(last) is MEANING[name]
    assert os.strerror(code) in str(last)
    assert not any(isinstance(answer, BadDataError) for answer in before)


def test_the_frames_before_a_failing_read_are_those_of_an_intact_file(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """libav returns a partial packet after a failed read: it must not become a picture."""
    healthy = cut(files["matroska"])  # libav reads the end of the others when it opens them
    sicken(monkeypatch, OSError(errno.EIO, "Input/output error"), *PHASES["decode end"])
    *before, last = cut(files["matroska"])
    assert isinstance(last, StorageUnavailable)
    assert len(before) > 1
    for got, wanted in zip(before[1:], healthy[1:], strict=False):
        assert (got.planes_T3HW == wanted.planes_T3HW).all()


def test_a_real_read_error_is_a_storage_error() -> None:
    # Linux answers EIO for a page that is not mapped: here page 0.
    with pytest.raises(StorageUnavailable, match="/proc/self/mem"):
        open_video("/proc/self/mem", validate(DecodeConfig, {}))


def test_a_file_that_was_removed_or_became_a_folder_is_source_changed(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.mp4", tmp_path):
        with pytest.raises(SourceChanged, match="removed or replaced"):
            open_video(str(path), validate(DecodeConfig, {}))


def test_damaged_bytes_are_damage_on_disk_and_in_memory(tmp_path: Path) -> None:
    """Hostile headers make libav seek to impossible offsets, which the system refuses: the disk does not fail."""
    rng = random.Random(7)
    path = tmp_path / "video"
    for container in CONTAINERS:
        data = encode(
            16, container=container, options={"preset": "ultrafast"} if container != "avi" else {}, picture=textured
        )
        for _ in range(25):
            harmed = harm(data, rng)
            path.write_bytes(harmed)
            from_memory, from_disk = cut(harmed), cut(str(path))
            assert [type(answer) for answer in from_memory] == [type(answer) for answer in from_disk]
            assert getattr(from_memory[-1], "reason", None) == getattr(from_disk[-1], "reason", None)
