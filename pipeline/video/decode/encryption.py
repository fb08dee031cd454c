"""Detection of encrypted videos from container headers. Part of the decode package.

libav does not report encryption: without the key it decodes Common Encryption to grey frames, or fails with "Invalid data".
Covers MP4 (Common Encryption, FairPlay), Matroska and WebM (ContentEncryption), ASF (Windows Media DRM) and scrambled MPEG-TS.
"""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from pipeline.video.decode.ebml import MAGIC, MOST_ELEMENTS, SEGMENT, TRACK, TRACKS, find, unsigned
from pipeline.video.decode.encoded_file import open_encoded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.video.decode.ebml import Element
    from pipeline.video.decode.encoded_file import EncodedFile

ENTRY_BYTES = 64 * 1024  # of a sample description
PROTECTED_ENTRIES = {b"encv": "Common Encryption", b"drmi": "FairPlay"}
DESCENDED = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}

TRACK_TYPE, ENCODINGS, ENCODING, ENCRYPTION = 0x83, 0x6D80, 0x6240, 0x5035
VIDEO_TRACK = 1

ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_ENCRYPTION = {
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"),  # content encryption
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"),  # extended
    bytes.fromhex("b69b077aa4da124ea5ca91d38dc11a8d"),  # advanced
}

TS_SYNC, TS_LOOK_BYTES, TS_PACKETS = 0x47, 1 << 20, 8  # a run of packets this long is taken for MPEG-TS
TS_NULL_PID = 0x1FFF


def why_encrypted(video: bytes | str) -> str | None:
    """The encryption scheme, as text for a message; None if no header names one. Reads a few kB, of MPEG-TS the first MB.

    Raises:
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    with closing(open_encoded(video)) as file:
        head = file.read(64)
        found = None
        if head[4:8] in (b"ftyp", b"styp", b"moov", b"moof", b"free", b"skip", b"wide", b"mdat", b"sidx", b"pdin"):
            found = _mp4(file)
        elif head.startswith(MAGIC):
            found = "ContentEncryption of Matroska" if _matroska(file) else None
        elif head.startswith(ASF_HEADER):
            found = "Windows Media DRM" if _asf(file, head) else None
        elif TS_SYNC in head[:5]:
            found = "a scrambled transport stream" if _transport_stream(file) else None
        file.check()
        return found


def lacks_index(video: bytes | str) -> bool:
    """Whether an MP4 or MOV has no index (`moov` or `moof`): it ends too early, and nothing of it can be decoded.

    Raises:
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    with closing(open_encoded(video)) as file:
        if file.read(8)[4:] != b"ftyp":
            return False
        names = {name for name, _, _ in _boxes(file, 0, _size(file))}
        file.check()
        return not names & {b"moov", b"moof"}


# --- MP4 --------------------------------------------------------------------------------------------------------------


def _mp4(file: EncodedFile) -> str | None:
    video = False
    for name, start, end in _boxes(file, 0, _size(file)):
        if name == b"hdlr":
            file.seek(start + 8)
            video = file.read(4) == b"vide"
        elif name == b"stsd" and video:
            file.seek(start)
            if (found := _sample_entries(file.read(min(end - start, ENTRY_BYTES)))) is not None:
                return found
    return None


def _boxes(file: EncodedFile, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and end of the contents of each box, in order, including boxes inside those of `DESCENDED`."""
    ends = [end]
    for _ in range(MOST_ELEMENTS):
        while ends and at + 8 > ends[-1]:
            at = ends.pop()
        if not ends:
            return
        file.seek(at)
        header = file.read(16)
        size, name, start = int.from_bytes(header[:4], "big"), header[4:8], at + 8
        if size == 1:
            size, start = int.from_bytes(header[8:16], "big"), at + 16
        stop = ends[-1] if size == 0 else at + size
        if stop < start or len(header) < 8:
            return
        stop = min(stop, ends[-1])
        yield name, start, stop
        if name in DESCENDED:
            ends.append(stop)
            at = start
        else:
            at = stop


def _sample_entries(stsd: bytes) -> str | None:
    at = 8
    while at + 8 <= len(stsd):
        size, name = int.from_bytes(stsd[at : at + 4], "big"), stsd[at + 4 : at + 8]
        entry = stsd[at : at + size]
        if name in PROTECTED_ENTRIES and _is_protected(entry):
            scheme = entry.find(b"schm")
            code = entry[scheme + 8 : scheme + 12].decode("latin-1") if scheme >= 0 else ""
            return f"{PROTECTED_ENTRIES[name]}, scheme {code}" if code.isalnum() else PROTECTED_ENTRIES[name]
        at += max(size, 8)
    return None


def _is_protected(entry: bytes) -> bool:
    # `tenc`: version and flags, two bytes, then default_isProtected. It may be 0: the entry has the name, but its frames are clear.
    at = entry.find(b"tenc")
    return at < 0 or len(entry) <= at + 10 or entry[at + 10] != 0


# --- Matroska ---------------------------------------------------------------------------------------------------------


def _matroska(file: EncodedFile) -> bool:
    tracks = next(find(file, 0, _size(file), SEGMENT, TRACKS), None)
    if tracks is None:
        return False
    return any(_is_encrypted_video(file, track) for track in find(file, tracks.content, tracks.end, TRACK))


def _is_encrypted_video(file: EncodedFile, track: Element) -> bool:
    kind = next(find(file, track.content, track.end, TRACK_TYPE), None)
    if kind is None or unsigned(file, kind) != VIDEO_TRACK:
        return False
    return any(find(file, track.content, track.end, ENCODINGS, ENCODING, ENCRYPTION))


# --- others -----------------------------------------------------------------------------------------------------------


def _asf(file: EncodedFile, head: bytes) -> bool:
    at, end = 30, min(int.from_bytes(head[16:24], "little"), _size(file))
    for _ in range(MOST_ELEMENTS):
        if at + 24 > end:
            return False
        file.seek(at)
        header = file.read(24)
        if header[:16] in ASF_ENCRYPTION:
            return True
        at += max(24, int.from_bytes(header[16:24], "little"))
    return False


def _transport_stream(file: EncodedFile) -> bool:
    file.seek(0)
    data = np.frombuffer(file.read(TS_LOOK_BYTES), np.uint8)
    for step, offset in ((188, 0), (192, 4), (204, 0)):
        count = (len(data) - offset) // step
        packets_N4 = data[offset : offset + count * step].reshape(count, step)[:, :4]
        if count < TS_PACKETS or (packets_N4[:, 0] == TS_SYNC).mean() < 0.9:
            continue
        pids = (packets_N4[:, 1] & 0x1F).astype(np.int64) << 8 | packets_N4[:, 2]
        with_payload = (packets_N4[:, 3] & 0x10 > 0) & (pids != TS_NULL_PID)
        return bool((packets_N4[with_payload, 3] >> 6 > 0).mean() > 0.5) if with_payload.any() else False
    return False


def _size(file: EncodedFile) -> int:
    return file.seek(0, os.SEEK_END)
