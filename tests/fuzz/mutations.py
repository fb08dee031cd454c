"""Mutations of files by a seeded generator, which gives the same mutants in every run."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

HEAD = 1500  # bytes: headers are mutated more often
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
Mutation = Callable[[bytearray, random.Random], None]


def _place(data: bytearray, rng: random.Random) -> int:
    """A position, half of the time near the beginning or the end."""
    size = max(1, len(data))
    area = rng.randrange(4)
    if area == 0:
        return rng.randrange(min(HEAD, size))
    if area == 1:
        return max(0, size - 1 - rng.randrange(min(HEAD, size)))
    return rng.randrange(size)


def flip_bits(data: bytearray, rng: random.Random) -> None:
    """Flips 1 to 100 bits."""
    for _ in range(rng.choice((1, 1, 3, 20, 100))):
        if data:
            data[_place(data, rng)] ^= 1 << rng.randrange(8)


def set_bytes(data: bytearray, rng: random.Random) -> None:
    """Replaces a run of bytes by noise, zeros or ones."""
    at, size = _place(data, rng), rng.choice((1, 4, 60, 500))
    fill = rng.choice((None, 0, 0xFF))
    data[at : at + size] = (
        rng.randbytes(len(data[at : at + size])) if fill is None else bytes([fill]) * len(data[at : at + size])
    )


def cut_end(data: bytearray, rng: random.Random) -> None:
    """Removes the end."""
    del data[rng.randrange(len(data) + 1) :]


def cut_piece(data: bytearray, rng: random.Random) -> None:
    """Removes bytes in the middle."""
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 4, 188, 2000))]


def insert_piece(data: bytearray, rng: random.Random) -> None:
    """Doubles a run of bytes, or inserts noise."""
    at, size = _place(data, rng), rng.choice((1, 4, 188, 2000))
    source = _place(data, rng)
    data[at:at] = data[source : source + size] if rng.random() < 0.5 else rng.randbytes(size)


def swap_chunks(data: bytearray, rng: random.Random) -> None:
    """Swaps two chunks."""
    size = rng.choice((4, 188, 512, 4096))
    if len(data) > 2 * size:
        first, second = (rng.randrange(len(data) // size) * size for _ in range(2))
        a, b = bytes(data[first : first + size]), bytes(data[second : second + size])
        if len(a) == len(b):
            data[first : first + size], data[second : second + size] = b, a


def change_number(data: bytearray, rng: random.Random) -> None:
    """Sets a field of 1 to 8 bytes to an extreme, or changes it a little: sizes, counts, times."""
    at, form = _place(data, rng), rng.choice((">B", ">H", "<H", ">I", "<I", ">Q"))
    width = struct.calcsize(form)
    if at + width <= len(data):
        (value,) = struct.unpack_from(form, data, at)
        new = rng.choice((*NUMBERS, value + 1, value - 1, value * 2))
        struct.pack_into(form, data, at, new % (1 << 8 * width))


def name_a_path(paths: Sequence[str]) -> Mutation:
    """Writes a path over bytes, as a reference to another file."""

    def mutation(data: bytearray, rng: random.Random) -> None:
        at, text = _place(data, rng), rng.choice(paths).encode() + b"\0"
        data[at : at + len(text)] = text

    return mutation


COMMON: tuple[Mutation, ...] = (
    flip_bits,
    flip_bits,
    set_bytes,
    cut_end,
    cut_piece,
    insert_piece,
    swap_chunks,
    change_number,
    change_number,
)


def mutate(data: bytes, rng: random.Random, extra: Sequence[Mutation] = ()) -> bytes:
    """`data` after one to three mutations."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice((*COMMON, *extra))(made, rng)
    return bytes(made)


def mutate_tar(data: bytes, rng: random.Random, extra: Sequence[Mutation] = ()) -> bytes:
    """A tar after mutations, half of them inside a header, with or without a checksum that fits."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        if rng.random() < 0.5 or len(made) < 1024:
            rng.choice((*COMMON, *extra))(made, rng)
            continue
        at = rng.choice([n for n in range(0, len(made) - 511, 512) if made[n + 257 : n + 262] == b"ustar"] or [0])
        header = made[at : at + 512]
        field, size = rng.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
        header[field : field + size] = _field(rng, size)
        if rng.random() < 0.7:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        made[at : at + 512] = header
    return bytes(made)


def _field(rng: random.Random, size: int) -> bytes:
    """Contents of a header field: a number, a type, a name that leads elsewhere, noise."""
    choices = (
        b"%011o" % rng.choice(NUMBERS),
        b"\x80" + rng.randbytes(11),
        bytes([rng.choice(b"01234567xgLKSV")]),
        rng.choice(
            (
                b"../../escape.mp4",
                b"/tmp/escape.mp4",
                b"a/../../escape.mp4",
                b"m0000.mp4",
                b"\xff\xfe.mp4",
                b"",
                b".",
                b"//",
            )
        ),
        rng.randbytes(size),
    )
    return rng.choice(choices)[:size].ljust(size, b"\0")
