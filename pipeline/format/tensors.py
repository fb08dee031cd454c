"""Latent arrays as bytes: storage types, hashes, per-channel statistics, range checks, and tensor file headers.

Takes arrays `CTHW` in a storage dtype (bfloat16 as uint16 bits), or the bytes of a finished file. Returns memory views without a copy,
float statistics, BLAKE2b hashes, `.npy` and safetensors headers. Independent of the container.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DamagedInput
from pipeline.format.codec import INT8, decoded, element_of, encoded, held_type, is_plain, value_type
from pipeline.records import LATENT_DTYPES, ChannelStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PIECE_BYTES = 4 * 1024 * 1024
LARGEST_HALF = 65504.0  # float16
BLOCK_ELEMENTS = 1 << 18  # values measured at a time: bounds the float32 temporaries to about 2 MiB


@dataclass(frozen=True, slots=True)
class StorageType:
    """Memory layout of one storage dtype. `exponent`: mask of the exponent bits, all set in infinity and NaN; 0 for integers."""

    numpy: str
    bits: str
    exponent: int
    safetensors: str

    @property
    def num_bytes(self) -> int:
        """Bytes of one value."""
        return np.dtype(self.numpy).itemsize


STORAGE_TYPES = {
    "float16": StorageType(LATENT_DTYPES["float16"], "<u2", 0x7C00, "F16"),
    "bfloat16": StorageType(LATENT_DTYPES["bfloat16"], "<u2", 0x7F80, "BF16"),
    "float32": StorageType(LATENT_DTYPES["float32"], "<u4", 0x7F800000, "F32"),
    INT8: StorageType("|i1", "|u1", 0, "I8"),
}


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes of one tensor as they are stored, with shape, storage name (`format.codec`) and BLAKE2b-128 in hex."""

    data: memoryview
    shape: tuple[int, ...]
    dtype: str
    hash: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.data.nbytes


def payload(array_CTHW: np.ndarray, dtype: str) -> Payload:
    """The array as it is stored under the storage name `dtype`. Plain: its bytes, little-endian in C order, copied only if the array is
    not contiguous.

    Raises:
        ValueError: the array's numpy type is not the one that `dtype` is made from.
    """
    wanted = np.dtype(LATENT_DTYPES[held_type(element_of(dtype))])
    if array_CTHW.dtype != wanted:
        raise ValueError(f"a {dtype} latent is held as numpy {wanted}, got {array_CTHW.dtype}")
    data = encoded(array_CTHW, dtype).data
    return Payload(data, tuple(array_CTHW.shape), dtype, payload_hash(data))


def image_payload(data: bytes | memoryview) -> Payload:
    """An image file as it is stored: its shape is its length in bytes, its type has no name among `STORAGE_TYPES`."""
    return Payload(memoryview(data), (len(data),), "image", payload_hash(data))


def image_suffix(head: bytes) -> str:
    """`webp` or `png`, from the first 16 bytes of an image file or more. Raises ValueError for another kind of file."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    raise ValueError(f"expected an image file of kind WebP or PNG, got one that begins with {head[:12]!r}")


def payload_hash(data: bytes | memoryview) -> str:
    """BLAKE2b-128 in hex, as stored in side indexes."""
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces(memoryview(data)):
        found.update(piece)
    return found.hexdigest()


def pieces(data: memoryview) -> Iterator[memoryview]:
    """`data` in pieces of 4 MiB. Pages already read are released, so a large file does not raise peak memory."""
    for begin in range(0, len(data), PIECE_BYTES):
        yield data[begin : begin + PIECE_BYTES]
        release_pages(data.obj)


def release_pages(array: object) -> None:
    """Releases the resident pages of a file-mapped array; an access reads them from the file again. Other arrays: no effect."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)


def stored_values(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a stored tensor of this shape; bfloat16 as float32, other plain types without a copy.

    Raises:
        ValueError: the bytes are not such a tensor.
    """
    stored = decoded(data, dtype, shape)
    return (stored.astype("<u4") << 16).view("<f4") if value_type(dtype) == "bfloat16" else stored


def measure(
    array_CTHW: np.ndarray, dtype: str, max_abs: float, *, key: str, clip: int, name: str = "latent"
) -> ChannelStats:
    """Per-channel statistics of the values as float32, in bounded memory.

    Raises:
        DamagedInput: `non_finite_latent`: a NaN, an infinity (in float16: a magnitude above 65504) or a magnitude above `max_abs`; the
            message has tensor (`name`), clip, channel and magnitude.
    """
    channels, frames, height, width = array_CTHW.shape
    step = min(frames, max(1, BLOCK_ELEMENTS // (channels * height * width)))
    work_CN = np.empty((2, channels, step * height * width), np.float32)
    stats = ChannelStats(n=0, mean=(), m2=(), min=(), max=())
    for first in range(0, frames, step):
        block_CN = array_CTHW[:, first : first + step].reshape(channels, -1)
        values_CN, spare_CN = work_CN[:, :, : block_CN.shape[1]]
        _to_float32(block_CN, dtype, values_CN)
        limit = min(max_abs, LARGEST_HALF) if dtype == "float16" else max_abs
        _refuse_absurd(values_CN, limit, block_CN, dtype, f"{name} of clip {clip}", key)
        stats = stats.merge(_block_stats(values_CN, spare_CN))
        release_pages(array_CTHW)
    return stats


def measure_stored(tensor: Payload, *, key: str, clip: int) -> ChannelStats:
    """Statistics of the values that readers get of a tensor, as `measure`."""
    values_CTHW = decoded(tensor.data, tensor.dtype, tensor.shape)
    return measure(values_CTHW, value_type(tensor.dtype), LARGEST_HALF, key=key, clip=clip)


def _to_float32(stored: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Stored values as float32, exactly; infinities and NaN of float16 become magnitudes above 65504."""
    if dtype == "float32":
        out[...] = stored
    elif dtype == "bfloat16":
        bits = out.view(np.uint32)
        bits[...] = stored
        bits <<= 16
    else:  # three times as fast as astype: the same bits shifted into place, then the exponent's bias corrected by a product
        bits = out.view(np.int32)
        bits[...] = stored.view(np.int16)  # extends the sign
        bits <<= 13
        bits &= np.int32(np.uint32(0x8FFFE000).view(np.int32))
        out *= np.float32(2.0**112)


def _refuse_absurd(values_CN: np.ndarray, limit: float, stored: np.ndarray, dtype: str, what: str, key: str) -> None:
    low, high = values_CN.min(axis=1), values_CN.max(axis=1)
    good = (low >= -limit) & (high <= limit)  # NaN propagates through min and max, and compares as false
    if good.all():
        return
    channel = int(np.flatnonzero(~good)[0])
    exact = stored[channel].astype(np.float32) if dtype == "float16" else values_CN[channel]
    holds = f", and the largest float16 is {LARGEST_HALF:g} (write.dtype)" if dtype == "float16" else ""
    raise DamagedInput(
        "non_finite_latent",
        f"{what} has values from {exact.min():g} to {exact.max():g} in channel {channel}; "
        f"expected finite values within ±{limit:g} (write.max_abs){holds}. The clip was not written; "
        "check the weights, or try a wider compute dtype (model.compute_dtype float32)",
        key=key,
        stage="encode",
    )


def _block_stats(values_CN: np.ndarray, spare_CN: np.ndarray) -> ChannelStats:
    """Statistics of one block; `spare_CN` is overwritten."""
    count = values_CN.shape[1]
    centre = values_CN.mean(axis=1)  # float32 is close enough to centre on; the residual corrects it
    np.subtract(values_CN, centre[:, None], out=spare_CN)
    residual = spare_CN.sum(axis=1, dtype=np.float64)
    squares = np.array([np.dot(row, row) for row in spare_CN], np.float64)
    return ChannelStats(
        n=count,
        mean=tuple((centre + residual / count).tolist()),
        m2=tuple(np.maximum(squares - residual * residual / count, 0.0).tolist()),
        min=tuple(values_CN.min(axis=1).tolist()),
        max=tuple(values_CN.max(axis=1).tolist()),
    )


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """Header of a `.npy` file (version 1.0, C order); the payload follows."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": STORAGE_TYPES[dtype].numpy, "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


def safetensors_header(tensors: dict[str, Payload]) -> bytes:
    """Header of a `.safetensors` file; the payloads follow in the order of `tensors`. Made here, so that payloads can be streamed.

    An int8 payload is three tensors: `{name}.scale`, `{name}.zero` and `name`. A compressed one is a vector of bytes, and the file's
    metadata has storage name and shape.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        kind, channels = STORAGE_TYPES[element_of(tensor.dtype)].safetensors, tensor.shape[0]
        parts = [(name, kind, list(tensor.shape), tensor.num_bytes)]
        if tensor.dtype == INT8:
            constants = [(f"{name}.{part}", "F32", [channels], 4 * channels) for part in ("scale", "zero")]
            parts = [*constants, (name, kind, list(tensor.shape), tensor.num_bytes - 8 * channels)]
        elif tensor.dtype != element_of(tensor.dtype):
            parts = [(name, "U8", [tensor.num_bytes], tensor.num_bytes)]
            about = {"storage": tensor.dtype, "shape": json.dumps(tensor.shape)}
            entries["__metadata__"] = about
        for part, dtype, shape, num_bytes in parts:
            begin, end = end, end + num_bytes
            entries[part] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns payloads to 8 bytes
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class Span:
    """Byte range of a tensor in a data file, and the hash of these bytes. `dtype`: storage name, None for bytes that are not numbers;
    `shape`: of the tensor.
    """

    id: str
    offset: int
    length: int
    dtype: str | None
    hash: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpanProblem:
    """Difference between a tensor and its index entry."""

    id: str
    found: str
    expected: str


class SpanChecker:
    """Check of a data file in one pass, fed in pieces of any size: SHA-256 of the file, and the hash of every span.

    `finite=True` also counts infinities and NaN. Spans must not overlap. Memory: one piece, with `finite` also a tensor that is stored as
    int8 or compressed.
    """

    def __init__(self, spans: Iterable[Span], *, finite: bool) -> None:
        self._spans = sorted(spans, key=lambda span: span.offset)
        self._finite = finite
        self._sha256 = hashlib.sha256()
        self._at = 0
        self._next = 0
        self._begin_span()
        self.problems: list[SpanProblem] = []

    @property
    def num_bytes(self) -> int:
        """Bytes fed so far."""
        return self._at

    def feed(self, piece: bytes | memoryview) -> None:
        """Takes the next bytes of the file."""
        self._sha256.update(piece)
        view, end = memoryview(piece), self._at + len(piece)
        while self._next < len(self._spans) and self._spans[self._next].offset < end:
            span = self._spans[self._next]
            stop = span.offset + span.length
            part = view[max(span.offset, self._at) - self._at : min(stop, end) - self._at]
            self._span_hash.update(part)
            if self._finite and span.dtype is not None:
                if is_plain(span.dtype):
                    self._look_for_non_finite(part, STORAGE_TYPES[span.dtype])
                else:
                    self._tail += bytes(part)
            if stop > end:
                break
            self._end_span(span)
        self._at = end

    def finish(self) -> str:
        """SHA-256 of all bytes fed, in hex; spans that reach past the end become problems."""
        for span in self._spans[self._next :]:
            expected = f"{span.length} bytes at offset {span.offset}"
            self.problems.append(SpanProblem(span.id, f"the file ends at byte {self._at}", expected))
        return self._sha256.hexdigest()

    def _begin_span(self) -> None:
        self._span_hash = hashlib.blake2b(digest_size=16)
        self._tail = b""
        self._bad_values = 0

    def _end_span(self, span: Span) -> None:
        if (found := self._span_hash.hexdigest()) != span.hash:
            self.problems.append(SpanProblem(span.id, f"hash {found}", f"hash {span.hash}"))
        elif self._tail and span.dtype is not None and not is_plain(span.dtype):
            self._decode(span, span.dtype)
        if self._bad_values:
            self.problems.append(SpanProblem(span.id, f"{self._bad_values} values NaN or infinite", "finite values"))
        self._next += 1
        self._begin_span()

    def _decode(self, span: Span, storage: str) -> None:
        """Counts what is not finite in a tensor that had to be collected."""
        try:
            values = decoded(self._tail, storage, span.shape)
        except ValueError as error:
            self.problems.append(SpanProblem(span.id, str(error), f"a tensor stored as {storage}"))
            return
        self._tail = b""
        self._look_for_non_finite(values.reshape(-1).view(np.uint8).data, STORAGE_TYPES[value_type(storage)])

    def _look_for_non_finite(self, part: memoryview, kind: StorageType) -> None:
        width = np.dtype(kind.bits).itemsize
        if self._tail:  # a piece may end inside a value
            part = memoryview(self._tail + bytes(part))
        whole = len(part) // width * width
        bits = np.frombuffer(part[:whole], kind.bits)
        self._bad_values += int(np.count_nonzero((bits & kind.exponent) == kind.exponent))
        self._tail = bytes(part[whole:])
