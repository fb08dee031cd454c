"""Result of `lathe preview` as lines of text; the last line is the path of the sheet."""

from __future__ import annotations

from typing import Any

from pipeline.records import BASE

SKIPPED_SHOWN = 8  # clips without a source that are named; the others are counted


def preview_lines(description: dict[str, Any]) -> list[str]:
    """Lines of the dictionary that `pipeline.look.preview` returns."""
    network = description["network"]
    origin = "UNTRAINED random weights" if network["untrained"] else f"weights {network['weights_sha256'][:12]}"
    lines = [f"{network['network']}, {origin}, {network['compute_dtype']} on {network['device']}"]
    lines += [f"  {_name(row)}  {_quality(row['psnr'])}" for row in description["clips"]]
    skipped = description["without_original"]
    lines += [f"  {_name(row)}  skipped: {row['reason']}" for row in skipped[:SKIPPED_SHOWN]]
    if len(skipped) > SKIPPED_SHOWN:
        lines.append(f"  and {len(skipped) - SKIPPED_SHOWN} more without a source")
    return [*lines, *description["notices"], description["sheet"]]


def _name(row: dict[str, Any]) -> str:
    variant = "" if row["variant"] == BASE else f"{row['variant']}  "
    return f"{row['key']}, clip {row['clip']:<4}{variant}{row['bucket']:14}"


def _quality(psnr: float | None) -> str:
    return "decoded only" if psnr is None else f"{psnr:.2f} dB"
