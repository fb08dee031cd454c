"""Result of `lathe evaluate` as lines of text."""

from __future__ import annotations

from typing import Any

from pipeline.units import quantities, quantity

CHANNELS_SHOWN = 32


def evaluation_lines(summary: dict[str, Any]) -> list[str]:
    """Lines of the dictionary that `pipeline.evaluation.evaluate` returns."""
    network, overall = summary["network"], summary["overall"]
    origin = "UNTRAINED random weights" if network["untrained"] else f"weights {network['weights_sha256'][:12]}"
    lines = [
        f"{network['network']}, {origin}, {network['compute_dtype']} on {network['device']}: "
        f"{quantities(overall, 'clip', 'frame')} of {quantity(summary['videos'], 'video')}",
        f"  {'bucket':16}{'clips':>7}{'PSNR dB':>9}{'of MSE':>8}{'SSIM':>8}{'LPIPS':>8}{'kept':>8}{'bits/px':>9}{'ratio':>8}",
    ]
    lines += [_row(name, found) for name, found in summary["buckets"].items()]
    if len(summary["buckets"]) > 1:
        lines.append(_row("all", overall))
    psnr = overall["psnr"]
    lines.append(f"  PSNR            {psnr['min']:.2f} to {psnr['max']:.2f} dB, deviation {psnr['std']:.2f} over clips")
    if overall["ssim_by_position"]:
        positions = "  ".join(f"{i}: {value:.4f}" for i, value in enumerate(overall["ssim_by_position"], 1))
        lines.append(f"  SSIM in group   {positions}  (margin {overall['ssim_margin']:.4f})")
    if summary["lpips"] is None:
        lines.append("  LPIPS           not measured: no weights; --lpips FILE takes them")
    lines.append(f"  rFVD            {_rfvd(summary)}")
    lines += _latent_lines(summary["latents"])
    lines.append(f"  rejected        {summary['rejected']['total'] or 'nothing'}")
    for reason, item in sorted(summary["rejected"]["reasons"].items(), key=lambda pair: -pair[1]["count"]):
        kind = "by the job's rules" if item["policy"] else "damaged"
        lines.append(f"    {reason:14}{item['count']} ({kind}; {', '.join(item['keys'])}): {item['message']}")
    return [*lines, f"  written         {summary['folder']}: {', '.join(summary['files'])}"]


def _row(name: str, found: dict[str, Any]) -> str:
    def mean(which: str) -> float | None:
        return found[which]["mean"] if found[which] else None

    return (
        f"  {name:16}{found['clips']:>7}{mean('psnr'):>9.2f}{mean('psnr_of_mse'):>8.2f}{mean('ssim'):>8.4f}"
        f"{_number(mean('lpips')):>8}{_number(found['degree']):>8}{found['bits_per_pixel']:>9.3f}{found['compression_ratio']:>7.1f}x"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rfvd(summary: dict[str, Any]) -> str:
    found = summary["rfvd"]
    if summary["i3d"] is None:
        return "not measured: no weights; --i3d FILE takes them"
    windows = quantity(found["windows"], "whole clip")
    if found["window_frames"] is not None:
        windows = f"{quantity(found['windows'], 'window')} of {quantity(found['window_frames'], 'frame')}"
    if found["rfvd"] is None:
        return f"not measured: {windows}, and it takes at least two"
    return (
        f"{found['rfvd']:.2f} over {windows}, {found['pair_distance']:.2f} within pairs (protocol {found['protocol']})"
    )


def _latent_lines(latents: dict[str, Any]) -> list[str]:
    def shown(name: str) -> str:
        values = latents[name]
        text = " ".join(f"{value:.3g}" for value in values[:CHANNELS_SHOWN])
        return text if len(values) <= CHANNELS_SHOWN else f"{text} ... ({len(values)} channels)"

    return [f"  latent mean     {shown('mean')}", f"  latent std      {shown('std')}"]
