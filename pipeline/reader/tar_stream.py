"""Forward reader of a tar that reports damage instead of ending early.

Takes a stream of an archive, plain or gz/bz2/xz (detected by content). Yields its members in order, and `Damage` for bytes that are not a
tar. Python's `tarfile` parses the headers, but silently ends at a truncation, at zero blocks between two archives and at a broken header.
This reader continues behind zero blocks, and behind a broken header at the next valid one.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = tarfile.BLOCKSIZE
PIECE_BYTES = 1024 * 1024
HEADER_BYTES = 1024 * 1024  # limit for the headers of one member; names and attributes need far less
CHAIN_BYTES = 16 * 1024  # a broken header longer than this is skipped as a whole
GLOBAL_HEADERS = 64  # most keywords a global header may set
MAGIC = b"ustar"
MAGIC_OFFSET = 257
# These four names of tarfile are missing from its published types.
EndMarker = tarfile.EOFHeaderError  # type: ignore[attr-defined]
NothingLeft = tarfile.EmptyHeaderError  # type: ignore[attr-defined]
CutHeader = tarfile.TruncatedHeaderError  # type: ignore[attr-defined]
BadHeader = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
# What tarfile raises for false headers: bad numbers, endless chains of long names, endless sparse maps.
BAD_HEADER = (tarfile.TarError, ValueError, KeyError, IndexError, OverflowError, RecursionError)


class Readable(Protocol):
    """The part of a read stream used here."""

    def read(self, n: int = -1) -> bytes:
        """The next `n` bytes, fewer only at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are not a valid tar. `member` is the name of the member whose contents are cut short, if one is."""

    reason: str  # truncated_shard | corrupt_header | corrupt_compression | unsupported_compression | not_a_tar
    message: str
    member: str | None = None


class CutShort(Exception):
    """The archive ends inside the member being read, or the sparse map of the member points outside of it."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. Its contents can be read once, before the next entry is requested."""

    info: tarfile.TarInfo
    name: str
    size: int
    offset: int | None  # of the contents in the object; None if they are compressed or sparse
    _open: Callable[[], Readable]

    def read(self) -> bytes:
        """The contents.

        Raises:
            CutShort: there is less than the header says.
        """
        return b"".join(self._pieces(self.size))

    def pieces(self) -> Iterator[bytes]:
        """The contents, a megabyte at a time. Raises as `read`."""
        return self._pieces(PIECE_BYTES)

    def _pieces(self, piece_bytes: int) -> Iterator[bytes]:
        source, left = self._open(), self.size
        while left:
            try:
                data = source.read(min(left, piece_bytes))
            except tarfile.TarError as error:
                raise CutShort(str(error)) from error
            if not data:
                raise CutShort(f"{self.name}: {left} of {self.size} bytes are missing")
            left -= len(data)
            yield data


class TarStream:
    """Iterator over the members of a tar, once. `counters` counts oddities: joined archives, short end markers, skipped bytes."""

    def __init__(self, stream: Readable, counters: dict[str, int]) -> None:
        self._bytes = _Forward(stream)
        self._counters = counters
        source: Any = self._bytes
        self._context: Any = _Context(fileobj=source, mode="r", encoding="utf-8", errors="surrogateescape")
        self._zeros = 0  # zero blocks since the last member
        self._members = 0

    @property
    def compressed(self) -> bool:
        """Whether the tar is compressed, so that offsets in the object are meaningless."""
        return self._bytes.compressed

    def __iter__(self) -> Iterator[Member | Damage]:
        while True:
            try:
                info = self._header()
            except EndMarker:
                self._zeros += 1
                continue
            except NothingLeft:
                break
            except BAD_HEADER:
                if self._bytes.header_cut:
                    if self._zeros and not any(self._bytes.header):
                        break  # padding that is not a multiple of a block
                    yield self._cut_header()
                    return
                yield self._resync()
                continue
            if self._zeros and self._members:
                self._count("concatenated_archives")
            self._zeros = 0
            self._members += 1
            yield self._member(info)
            damage = self._skip_contents(info)
            if damage is not None:
                yield damage
                if self._bytes.at_end:
                    return
        yield from self._ending()

    def _header(self) -> tarfile.TarInfo:
        """The next header with its extensions, parsed by tarfile, of at most `HEADER_BYTES`."""
        with self._bytes.parsing():
            info = tarfile.TarInfo.fromtarfile(self._context)
        if (
            info.size < 0
            or self._context.offset < self._bytes.tell()
            or len(self._context.pax_headers) > GLOBAL_HEADERS
        ):
            raise BadHeader("impossible size")
        return info

    def _member(self, info: tarfile.TarInfo) -> Member:
        if info.issparse():
            return Member(info, info.name, info.size, None, lambda: self._context.extractfile(info) or self._bytes)
        offset = None if self.compressed else info.offset_data
        return Member(info, info.name, info.size, offset, lambda: self._bytes)

    def _skip_contents(self, info: tarfile.TarInfo) -> Damage | None:
        """Moves to the next header; returns the damage if the contents are cut short."""
        following, here = self._context.offset, self._bytes.tell()
        if here > following:  # only a false sparse map reads past its own contents
            return Damage("corrupt_header", f"member {info.name!r} claims more bytes than it holds", info.name)
        self._bytes.seek(following)
        if self._bytes.tell() == following:
            return None
        stored = following - info.offset_data
        present = self._bytes.tell() - info.offset_data
        whole = info.size <= present if not info.issparse() else False
        if self._bytes.corrupt:
            return Damage("corrupt_compression", self._bytes.corrupt, None if whole else info.name)
        message = f"archive ends after {present} of {stored} bytes of member {info.name!r}"
        return Damage("truncated_shard", message, None if whole else info.name)

    def _cut_header(self) -> Damage:
        if self._bytes.corrupt:
            return Damage("corrupt_compression", self._bytes.corrupt)
        return Damage("truncated_shard", f"archive ends inside a header, at byte {self._bytes.tell()}")

    def _resync(self) -> Damage:
        """Skips to the next block with the magic and checksum of a header, or to the end."""
        start = self._bytes.give_back_header()
        found, ended_in_zeros = self._bytes.skip_to(_is_header)
        skipped = self._bytes.tell() - start
        self._context.pax_headers = {}
        if not found and self._bytes.corrupt:
            self._zeros = 2  # reported once: no missing end marker in addition
            message, self._bytes.corrupt = self._bytes.corrupt, ""
            return Damage("corrupt_compression", message)
        if not found and self._members == 0:
            self._zeros = 2
            return Damage(*self._bytes.not_a_tar())
        self._count("resynced_headers")
        self._count("resynced_bytes", skipped)
        self._zeros = 2 if ended_in_zeros else 0
        return Damage(
            "corrupt_header", f"{skipped} bytes from byte {start} on are not a tar; reading went on behind them"
        )

    def _ending(self) -> Iterator[Damage]:
        if self._bytes.corrupt:
            yield Damage("corrupt_compression", self._bytes.corrupt)
        elif not self._zeros:
            at = self._bytes.tell()
            yield Damage("truncated_shard", f"archive ends at byte {at} without an end-of-archive marker")
        elif self._bytes.cut:
            self._count("cut_compression_trailer")
        elif self._zeros == 1:
            self._count("short_end_marker")
        if self._zeros and not self._members:
            self._count("empty_archives")

    def _count(self, slug: str, n: int = 1) -> None:
        self._counters[slug] = self._counters.get(slug, 0) + n


class _Context(tarfile.TarFile):
    """The TarFile that `TarInfo.fromtarfile` needs. It does not read by itself and keeps no list of members."""

    def next(self) -> None:
        """Does nothing: `TarStream` reads the headers."""
        return None


class _Forward:
    """Forward-only file over a stream, decompressed, with bytes that can be given back. Records why it ended."""

    def __init__(self, stream: Readable) -> None:
        self.cut = False  # the compressed data breaks off
        self.corrupt = ""  # error of the decompressor
        self.header = bytearray()  # bytes of the header being parsed
        self.header_cut = False  # the stream ended inside that header
        self._ended = False
        self._parsing = False
        self._position = 0
        self._back = b""
        self._head = _read_fully(stream, 6)
        source: Any = _Joined(self._head, stream)  # the types of the three below demand more than they use
        self._source: Any = source
        self.compressed = True
        if self._head[:3] == b"\x1f\x8b\x08":
            self._source = gzip.GzipFile(fileobj=source)
        elif self._head[:3] == b"BZh":
            self._source = bz2.BZ2File(source)
        elif self._head[:6] == b"\xfd7zXZ\0":
            self._source = lzma.LZMAFile(source)  # noqa: SIM115
        else:
            self.compressed = False

    @property
    def at_end(self) -> bool:
        """Whether a read has reached the end, and nothing was given back since."""
        return self._ended and not self._back

    def read(self, n: int = -1) -> bytes:
        if self._parsing and len(self.header) + n > HEADER_BYTES:
            raise BadHeader(f"header longer than {HEADER_BYTES} bytes")
        data, self._back = self._back[:n], self._back[n:]
        if len(data) < n and not self._ended:
            data += self._draw(n - len(data))
        self._position += len(data)
        if self._parsing:
            self.header += data
            self.header_cut = len(data) < n
            if n and not data and self.header:
                raise CutHeader("archive ends inside a header")
        return data

    def _draw(self, n: int) -> bytes:
        pieces = []
        try:
            while n and (piece := self._source.read(n)):
                pieces.append(piece)
                n -= len(piece)
        except EOFError:
            self.cut = True
        except (OSError, zlib.error, lzma.LZMAError) as error:
            self.corrupt = f"compressed data is damaged after {self._position} unpacked bytes: {error}"
        self._ended = bool(n)
        return b"".join(pieces)

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return False

    def seek(self, position: int) -> int:
        """Moves forward, at most to the end; returns the position."""
        if position < self._position:
            raise tarfile.StreamError("cannot go back")
        while self._position < position and self.read(min(position - self._position, PIECE_BYTES)):
            pass
        return self._position

    @contextmanager
    def parsing(self) -> Iterator[None]:
        """Context in which one header is parsed: its bytes are bounded, and kept so that they can be given back."""
        self.header.clear()
        self.header_cut = False
        self._parsing = True
        try:
            yield
        finally:
            self._parsing = False

    def give_back_header(self) -> int:
        """Gives back the last header, but for one byte, so that it is not found again. Returns its position.

        A long chain of headers is not given back: a hostile one would be parsed again from each header in it.
        """
        start = self._position - len(self.header)
        if len(self.header) <= CHAIN_BYTES:
            self._back = bytes(self.header[1:]) + self._back
            self._position = start + 1
        return start

    def skip_to(self, is_header: Callable[[bytes], bool]) -> tuple[bool, bool]:
        """Moves to the next header or to the end. Returns (whether there is a header, whether the end is zero blocks)."""
        window = b""
        while piece := self.read(PIECE_BYTES):
            window += piece
            at = window.find(MAGIC)
            while at != -1:
                block = window[at - MAGIC_OFFSET : at - MAGIC_OFFSET + BLOCK] if at >= MAGIC_OFFSET else b""
                if is_header(block):
                    self._back = window[at - MAGIC_OFFSET :] + self._back
                    self._position -= len(window) - (at - MAGIC_OFFSET)
                    return True, False
                at = window.find(MAGIC, at + 1)
            window = window[1 - BLOCK :]
        return False, len(window) >= BLOCK - 1 and not any(window)

    def not_a_tar(self) -> tuple[str, str]:
        """Reason and message for bytes in which no header was found."""
        if self._head[:4] == b"\x28\xb5\x2f\xfd":
            return "unsupported_compression", "zstd is not supported; expected tar, tar.gz, tar.bz2 or tar.xz"
        found = f"no tar header in {self._position} bytes (they begin with {self._head!r})"
        return "not_a_tar", f"{found}; expected tar, gz, bz2 or xz"


class _Joined:
    """A stream behind its first bytes, which were read before."""

    def __init__(self, head: bytes, stream: Readable) -> None:
        self._head = head
        self._stream = stream

    def read(self, n: int = -1) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            if 0 <= n < len(head):
                head, self._head = head[:n], head[n:]
            return head
        return self._stream.read(n)


def _read_fully(stream: Readable, n: int) -> bytes:
    data = b""
    while len(data) < n and (piece := stream.read(n - len(data))):
        data += piece
    return data


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True
