"""Exact statistics of the rows of a receipt that count, if some do not. Reads latents by byte range.

A receipt has statistics of all its rows together. The smaller part is read: rows that count are measured, or rows that do not count are
measured and subtracted. One replaced video of a shard of 200 costs one latent, not 199; statistics in each row of the side index
would cost 1 kB a row in every output.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import InputError
from pipeline.format.tensors import payload_hash, stored_values
from pipeline.records import ChannelStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.format.index import IndexRow
    from pipeline.ledger.counted import Share
    from pipeline.storage import Store

BLOCK_VALUES = 1 << 20  # of all channels, measured at a time
Located = tuple[str, "IndexRow"]  # key of the data file, row


def part_statistics(
    store: Store, whole: ChannelStats | None, shares: Iterable[Share], *, complete: bool = True
) -> ChannelStats | None:
    """Statistics of the rows of `shares` that count; None if there are none.

    Args:
        store: the output.
        whole: statistics of all rows of the receipt.
        shares: files with their rows, see `Share`.
        complete: whether they have all rows of the receipt. If not, rows that count are measured.

    Raises:
        NotFound: a data file is missing.
        InputError: a latent is not the one that was written.
    """
    shares = list(shares)
    shown = [(share.file.key, row) for share in shares for row in share.shown]
    hidden = [(share.file.key, row) for share in shares for row in share.hidden_rows]
    if not shown:
        return None
    if not hidden and complete:
        return whole
    if complete and whole is not None and _num_values(hidden) < _num_values(shown) and finite(whole):
        rest = subtracted(whole, measured(store, hidden))
        if rest is not None and rest.n * len(rest.mean) == _num_values(shown):
            return rest
    return measured(store, shown)


def finite(stats: ChannelStats) -> bool:
    """Whether all numbers are."""
    return bool(np.isfinite((*stats.mean, *stats.m2, *stats.min, *stats.max)).all())


def measured(store: Store, rows: Iterable[Located]) -> ChannelStats:
    """Statistics of these latents. Not finite if a value is not. Raises as `part_statistics`."""
    return reduce(ChannelStats.merge, (_latent_stats(store, *located) for located in rows))


def subtracted(whole: ChannelStats, part: ChannelStats) -> ChannelStats | None:
    """Statistics of `whole` without `part`, the inverse of `ChannelStats.merge`; None if the least or greatest value may be in `part`."""
    n = whole.n - part.n
    extremes = zip(part.min, whole.min, part.max, whole.max, strict=True)
    if n <= 0 or not all(low > least and high < greatest for low, least, high, greatest in extremes):
        return None
    mean = [(a * whole.n - b * part.n) / n for a, b in zip(whole.mean, part.mean, strict=True)]
    delta = [b - a for a, b in zip(mean, part.mean, strict=True)]
    m2 = [max(0.0, a - b - d * d * n * part.n / whole.n) for a, b, d in zip(whole.m2, part.m2, delta, strict=True)]
    return ChannelStats(n, tuple(mean), tuple(m2), whole.min, whole.max)


def read_latent(store: Store, key: str, row: IndexRow) -> bytes:
    """The stored latent of one row.

    Raises:
        NotFound: the data file is missing.
        InputError: its bytes are not those that were written.
    """
    data = store.read_range(key, row.latent_offset, row.latent_length)
    if (found := payload_hash(data)) != row.latent_hash:
        raise InputError(
            f"{key}, row {row.id}: the latent has the hash {found}, its index says {row.latent_hash}; `lathe verify` reads all rows"
        )
    return data


def _latent_stats(store: Store, key: str, row: IndexRow) -> ChannelStats:
    data = read_latent(store, key, row)
    stored_CN = stored_values(data, row.dtype, row.shape).reshape(row.shape[0], -1)
    stats = ChannelStats(0, (), (), (), ())
    step = max(1, BLOCK_VALUES // len(stored_CN))
    for at in range(0, stored_CN.shape[1], step):
        stats = stats.merge(_block_stats(stored_CN[:, at : at + step].astype(np.float64)))
    return stats


def _block_stats(values_CN: np.ndarray) -> ChannelStats:
    with np.errstate(invalid="ignore", over="ignore"):
        mean = values_CN.mean(1)
        m2 = ((values_CN - mean[:, None]) ** 2).sum(1)
        found = (mean, m2, values_CN.min(1), values_CN.max(1))
    return ChannelStats(values_CN.shape[1], *(tuple(each.tolist()) for each in found))


def _num_values(rows: Iterable[Located]) -> int:
    return sum(math.prod(row.shape) for _, row in rows)
