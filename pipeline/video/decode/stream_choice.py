"""Choice of the stream to decode among a container's video streams: a moving one, not a cover picture. Part of the decode package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from av.stream import Disposition

from pipeline.errors import DamagedInput, PolicyReject

NEVER = Disposition.attached_pic | Disposition.timed_thumbnails
MOVING_PACKETS = 2  # a stream with fewer is a picture
# Packets are counted until each candidate moves, past sound at the beginning: muxers write tracks in turns of a second or more.
LOOK_ALL_PACKETS, LOOK_BYTES = 2000, 64 << 20


def choose(container: Any, count: Callable[[set[int]], Counter[int]]) -> tuple[Any, tuple[Any, ...]]:
    """The stream to decode, and the other candidates, which may be pictures. `count` returns the number of packets near the beginning, by
    stream index; it is called only if there are several candidates.

    Raises:
        PolicyReject: `no_video_stream`.
        DamagedInput: `no_decoder`.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & NEVER]
    if not list(container.streams):
        raise DamagedInput("undecodable", "the container lists no stream: its header is cut or broken", stage="decode")
    if not streams:
        types = {"cover art" if stream.type == "video" else stream.type for stream in container.streams}
        kinds = ", ".join(sorted(types))
        raise PolicyReject("no_video_stream", f"the file holds no video, only {kinds}", stage="decode")
    usable = [stream for stream in streams if stream.codec_context is not None]
    if not usable:
        raise DamagedInput("no_decoder", "the video stream's codec is unknown to this libav", stage="decode")
    if len(usable) == 1:
        return usable[0], ()
    packets = count({stream.index for stream in usable})
    moving = [stream for stream in usable if packets[stream.index] >= MOVING_PACKETS] or usable
    for stream in container.streams.video:
        if stream not in moving:  # libav's last choice
            stream.disposition = Disposition.hearing_impaired
    best = container.streams.best("video")
    chosen = best if best in moving else moving[0]
    return chosen, tuple(stream for stream in usable if stream is not chosen)


def count_packets(container: Any, indices: set[int], found: Counter[int]) -> None:
    """Counts packets of the streams `indices` near the beginning of an open container, into `found` by stream index."""
    num_bytes = 0
    for number, packet in enumerate(container.demux()):
        num_bytes += packet.size
        if packet.size and packet.stream_index in indices:
            found[packet.stream_index] += 1
            if all(found[index] >= MOVING_PACKETS for index in indices):
                break
        if number >= LOOK_ALL_PACKETS or num_bytes >= LOOK_BYTES:
            break
