"""How a preview reads on a terminal. Enters: its JSON-ready account. Leaves: lines of text; the last one is the path of the sheet."""

from __future__ import annotations

from typing import Any

PASSED_OVER = 8  # clips without a source named one by one; the rest are counted


def preview_lines(account: dict[str, Any]) -> list[str]:
    """The dictionary of `pipeline.look.preview`."""
    network = account["network"]
    origin = "UNTRAINED random weights" if network["untrained"] else f"weights {network['weights_sha256'][:12]}"
    lines = [f"{network['network']}, {origin}, {network['compute_dtype']} on {network['device']}"]
    lines += [f"  {_name(row)}  {_quality(row['psnr'])}" for row in account["clips"]]
    passed = account["without_original"]
    lines += [f"  {_name(row)}  passed over: {row['reason']}" for row in passed[:PASSED_OVER]]
    if len(passed) > PASSED_OVER:
        lines.append(f"  and {len(passed) - PASSED_OVER} more without a source")
    return [*lines, *account["notices"], account["sheet"]]


def _name(row: dict[str, Any]) -> str:
    return f"{row['key']}, clip {row['clip']:<4}{row['bucket']:14}"


def _quality(psnr: float | None) -> str:
    return "decoded only" if psnr is None else f"{psnr:.2f} dB"
