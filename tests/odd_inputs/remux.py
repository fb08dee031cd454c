"""Packets of a finished video, changed and muxed again without encoding: cuts, lost times, damage, joins."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

Edit = Callable[[list[av.Packet]], Iterable[av.Packet]]


def packets_of(data: bytes) -> tuple[Any, list[av.Packet]]:
    """The open container and the packets of its video stream in file order."""
    container = av.open(io.BytesIO(data))
    return container, [packet for packet in container.demux(container.streams.video[0]) if packet.size]


def remux(
    data: bytes, container: str, edit: Edit = list, options: dict[str, str] | None = None, **attributes: Any
) -> bytes:
    """The same packets after `edit`, in another container. `attributes` are set on the new stream."""
    source, packets = packets_of(data)
    buffer = io.BytesIO()
    with source, av.open(buffer, "w", format=container, options=options or {}) as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        for name, value in attributes.items():
            setattr(stream, name, value)
        for packet in edit(packets):
            packet.stream = stream
            output.mux(packet)
    return buffer.getvalue()


def filtered(data: bytes, container: str, bitstream_filter: str) -> bytes:
    """The same video after one of libav's bitstream filters."""
    source, packets = packets_of(data)
    buffer = io.BytesIO()
    with source, av.open(buffer, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        context = av.BitStreamFilterContext(bitstream_filter, source.streams.video[0], stream)
        for packet in [*packets, None]:
            for made in context.filter(packet):
                made.stream = stream
                output.mux(made)
    return buffer.getvalue()


def replaced(packet: av.Packet, data: bytes) -> av.Packet:
    """A packet with other bytes and the same times."""
    new = av.Packet(data)
    new.time_base, new.pts, new.dts, new.duration = packet.time_base, packet.pts, packet.dts, packet.duration
    new.is_keyframe = packet.is_keyframe
    return new


def noise(size: int, seed: int = 0) -> bytes:
    """Seeded random bytes."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def harming(*positions: int, keep: int = 0) -> Edit:
    """The packets at these positions hold noise after their first `keep` bytes; a start code stays, so that the container's parser finds
    the packet. Negative positions count from the end.
    """

    def edit(packets: list[av.Packet]) -> Iterator[av.Packet]:
        wanted = {position % len(packets) for position in positions}
        for position, packet in enumerate(packets):
            data = bytes(packet)
            start = max(keep, 4 if data.startswith(b"\0\0\0\1") else 3 if data.startswith(b"\0\0\1") else 0)
            yield replaced(packet, data[:start] + noise(len(data) - start, position)) if position in wanted else packet

    return edit


def without(*positions: int) -> Edit:
    """The packets at these positions are missing."""
    return lambda packets: [packet for position, packet in enumerate(packets) if position not in positions]


def cut(first: int, last: int | None = None) -> Edit:
    """The packets from `first` to `last`, as a stream copy that starts anywhere leaves them."""
    return lambda packets: packets[first:last]


def shifted(seconds: float) -> Edit:
    """All times later by some seconds."""

    def edit(packets: list[av.Packet]) -> Iterator[av.Packet]:
        for packet in packets:
            ticks = round(Fraction(seconds) / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            yield packet

    return edit
