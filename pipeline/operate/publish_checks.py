"""Checks of a candidate before it is published. Each takes tables, returns a `Check` with its numbers. No I/O.

Statistics are compared with receipts as the unit: values within a video are correlated, so a standard error from the number of values
would make every difference significant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger.manifest import merged_stats, packed_stats
from pipeline.ledger.snapshots import Check
from pipeline.records import ChannelStats
from pipeline.units import quantity

if TYPE_CHECKING:
    from pipeline.ledger.candidate import Candidate

NAMED = 3  # offenders named in a message
SMALLEST_STD = 1e-12  # of which a logarithm is taken
FEWEST_RECEIPTS = 8  # on each side, to judge whether statistics have moved


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the checks."""

    reject_budget: float = 0.05
    """Largest fraction of damaged inputs. A single one never fails (unless 0); 1 allows all."""
    drift: float = 0.5
    """Largest difference to the parent per channel: mean, in standard deviations; standard deviation, as a fraction."""
    drift_errors: float = 6.0
    """Differences below this many standard errors never fail."""
    constants: float = 4.0
    """Latents normalised by the network's constants: largest mean, and largest factor between their standard deviation and 1."""
    removed: float = 0.5
    """Largest fraction of inputs, or of the parent's rows, that one snapshot drops because they are not listed any more."""


def conservation_check(candidate: Candidate) -> Check:
    """Counts add up: samples in = encoded + rejected, rows of files = clips of receipts, no receipt with an inconsistency."""
    receipts, files = candidate.receipts, candidate.files
    samples, encoded, rejected, clips = (_sum(receipts, name) for name in ("samples", "encoded", "rejected", "clips"))
    rows = _sum(files, "rows")
    wrong = receipts.filter(pc.is_valid(receipts["problem"]))
    numbers = {
        "samples": samples,
        "encoded": encoded,
        "rejected": rejected,
        "clips": clips,
        "rows": rows,
        "receipts_wrong": wrong.num_rows,
    }
    found = []
    if wrong.num_rows:
        first = wrong.slice(0, 1).to_pylist()[0]
        found.append(
            f"{quantity(wrong.num_rows, 'receipt does', 'receipts do')} not add up, such as {first['shard_id']}: {first['problem']}"
        )
    if samples != encoded + rejected:
        found.append(f"{samples} samples in, but {encoded} encoded + {rejected} rejected = {encoded + rejected}")
    if rows != clips:
        found.append(f"receipts count {clips} clips, files hold {rows} rows")
    return Check("conservation", not found, "; ".join(found), numbers)


def reject_check(receipts: pa.Table, limits: Limits) -> Check:
    """Damaged inputs stay within the budget. Inputs that the job's rules exclude are counted and never fail."""
    samples, rejected, damaged, regions = (
        _sum(receipts, name) for name in ("samples", "rejected", "damaged", "damaged_regions")
    )
    inputs = max(samples + regions, damaged)
    ratio = damaged / inputs if inputs else 0.0
    allowed = max(limits.reject_budget * inputs, 1 if limits.reject_budget > 0 else 0)
    ok = limits.reject_budget >= 1 or damaged <= allowed
    numbers = {
        "samples": samples,
        "rejected": rejected,
        "damaged": damaged,
        "reject_ratio": rejected / samples if samples else 0.0,
        "damaged_ratio": ratio,
        "limit": limits.reject_budget,
    }
    message = f"{damaged} of {inputs} inputs are damaged ({ratio:.1%}), the limit is {limits.reject_budget:.1%}; "
    return Check("rejects", ok, "" if ok else message + "repair them, or raise --reject-budget", numbers)


def finite_check(candidate: Candidate) -> Check:
    """Statistics of all receipts are finite; otherwise a file holds NaN or infinity."""
    bad, first = 0, ""
    for fingerprint in candidate.receipts["fingerprint"].unique().to_pylist():
        for shards, values in packed_stats(candidate.receipts_path, fingerprint):
            broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
            bad += len(broken)
            if len(broken):
                first = first or shards[broken[0]]
    wrong = quantity(bad, "receipt has", "receipts have")
    message = f"{wrong} statistics that are not finite, such as {first}; `lathe verify` names the rows"
    return Check("finite", not bad, message if bad else "", {"receipts_not_finite": bad})


def drift_check(candidate: Candidate, limits: Limits) -> Check:
    """Statistics of new receipts are close to those that the parent covers, per fingerprint and channel."""
    numbers: dict[str, Any] = {"limit": limits.drift, "limit_errors": limits.drift_errors}
    found = []
    for fingerprint in candidate.parent.fingerprints if candidate.parent is not None else ():
        sides = _sides(candidate, fingerprint)
        if sides is None:
            continue
        old, new = sides
        measured = _drift(old, new)
        judged = min(old.receipts, new.receipts) >= FEWEST_RECEIPTS
        counted = {"receipts": new.receipts, "receipts_before": old.receipts, "judged": judged}
        numbers[fingerprint] = {**counted, **measured}
        if not judged:
            continue
        for what, unit in (("mean", "standard deviations"), ("std", "of it")):
            values = measured[what]
            pairs = zip(values["difference"], values["errors"], strict=True)
            for channel, (difference, errors) in enumerate(pairs):
                if abs(difference) > limits.drift and abs(errors) > limits.drift_errors:
                    found.append(
                        f"{what} of channel {channel} moved by {difference:+.1%} {unit} ({errors:+.1f} standard errors; "
                        f"fingerprint {fingerprint[:8]}), the limit is {limits.drift:.0%}"
                    )
    judged = any(isinstance(item, dict) and item["judged"] for item in numbers.values())
    more = f" (and {len(found) - NAMED} more)" if len(found) > NAMED else ""
    return Check("drift", not found, "; ".join(found[:NAMED]) + more, numbers, judged=judged)


class _Side:
    """Merged statistics of some receipts, and the spread between them, of float64 `(receipts, channels)` that are given in parts."""

    def __init__(self) -> None:
        self.merged: ChannelStats | None = None
        self._means = ChannelStats(0, (), (), (), ())  # of the receipts' means
        self._logs = ChannelStats(0, (), (), (), ())  # of the logarithms of their standard deviations

    def add(self, values: np.ndarray) -> None:
        """Adds receipts, as `stats_arrays` gives them."""
        if not len(values):
            return
        mean, m2, _, _ = np.split(values[:, 1:], 4, axis=1)
        stds = np.sqrt(m2 / np.maximum(values[:, :1], 1))
        parts = [] if self.merged is None else [self.merged]
        self.merged = reduce(ChannelStats.merge, [*parts, *filter(None, [merged_stats([values])])])
        self._means = self._means.merge(_over_receipts(mean))
        self._logs = self._logs.merge(_over_receipts(np.log(np.maximum(stds, SMALLEST_STD))))

    @property
    def receipts(self) -> int:
        return self._means.n

    def squared_errors(self) -> tuple[np.ndarray, np.ndarray]:
        """Squared standard errors of the mean and of the logarithm of the standard deviation, per channel; 0 for one receipt."""
        n = self.receipts
        mean, log = (np.array(each.m2) / (n * max(n - 1, 1)) for each in (self._means, self._logs))
        return mean, log


def _over_receipts(values: np.ndarray) -> ChannelStats:
    mean = values.mean(0)
    found = (mean, ((values - mean) ** 2).sum(0), values.min(0), values.max(0))
    return ChannelStats(len(values), *(tuple(each.tolist()) for each in found))


def _sides(candidate: Candidate, fingerprint: str) -> tuple[_Side, _Side] | None:
    """Statistics of receipts that the parent covers, and of the others; None if one of the two is empty."""
    old, new = _Side(), _Side()
    for shards, values in packed_stats(candidate.receipts_path, fingerprint):
        fresh = pc.is_in(pa.array(shards, pa.string()), candidate.fresh).to_numpy(zero_copy_only=False)
        old.add(values[~fresh])
        new.add(values[fresh])
    return (old, new) if old.receipts and new.receipts else None


def _drift(old: _Side, new: _Side) -> dict[str, Any]:
    """Differences of mean (in standard deviations of `old`) and of standard deviation (as a fraction), each with standard errors."""
    if old.merged is None or new.merged is None:
        raise ValueError("both sides need receipts")
    found: dict[str, Any] = {}
    std_before = _std(old.merged)
    safe = np.where(std_before > 0, std_before, 1.0)
    difference = (np.array(new.merged.mean) - np.array(old.merged.mean)) / safe
    ratio = _std(new.merged) / safe
    of_means, of_logs = (one + two for one, two in zip(old.squared_errors(), new.squared_errors(), strict=True))
    for name, value, variance, scaled in (
        ("mean", difference, of_means / safe**2, difference),
        ("std", ratio - 1, of_logs, np.log(np.maximum(ratio, SMALLEST_STD))),
    ):
        if min(old.receipts, new.receipts) < 2:
            variance = np.zeros_like(scaled)
        error = np.sqrt(variance)
        errors = np.divide(scaled, error, out=np.zeros_like(scaled), where=error > 0)
        errors = np.where((error == 0) & (scaled != 0), np.copysign(1e9, scaled), errors)
        found[name] = {"difference": value.tolist(), "errors": errors.tolist()}
    return found


def constants_check(statistics: dict[str, tuple[ChannelStats | None, dict[str, Any]]], limits: Limits) -> Check:
    """Latents normalised by the constants of the network's authors have about mean 0 and standard deviation 1, over all channels."""
    numbers: dict[str, Any] = {"limit": limits.constants}
    found = []
    for fingerprint, (stats, constants) in statistics.items():
        normalised = normalised_by(stats, constants) if stats is not None else None
        if normalised is None:
            continue
        mean, std = normalised
        numbers[fingerprint] = {"mean": mean, "std": std, "drift_percent": 100 * (std - 1)}
        if not (abs(mean) <= limits.constants and 1 / limits.constants <= std <= limits.constants):
            found.append(
                f"latents normalised by the network's constants have mean {mean:.2f} and standard deviation {std:.2f} "
                f"(fingerprint {fingerprint[:8]}); expected about 0 and 1, within a factor of {limits.constants:g}: "
                "are these the right weights?"
            )
    judged = len(numbers) > 1
    return Check("constants", not found, "; ".join(found), numbers, judged=judged)


def normalised_by(stats: ChannelStats, constants: dict[str, Any]) -> tuple[float, float] | None:
    """Mean and standard deviation over all channels of latents normalised by `constants`; None if the network has no constants."""
    mean, std = np.array(stats.mean), _std(stats)
    if constants.get("mean") is not None and constants.get("std") is not None:
        means, stds = (
            (mean - np.array(constants["mean"])) / np.array(constants["std"]),
            std / np.array(constants["std"]),
        )
    elif constants.get("scale") is not None:
        shift = np.array(constants["shift"] if constants.get("shift") is not None else 0.0)
        scale = np.array(constants["scale"])
        means, stds = (mean - shift) * scale, std * scale
    else:
        return None
    overall = float(means.mean())
    return overall, math.sqrt(float((stds**2).mean() + means.var()))


def _std(stats: ChannelStats) -> np.ndarray:
    return np.sqrt(np.array(stats.m2) / max(stats.n, 1))


def _sum(table: pa.Table, column: str) -> int:
    return int(pc.sum(table[column]).as_py() or 0)
