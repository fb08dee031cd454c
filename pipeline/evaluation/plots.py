"""Plots of an evaluation's summary, as PNG files; opens no window and changes no global state of matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

SIZE_INCHES = (6.4, 4.0)
DPI = 120
BAR = "#3b6ea5"


def write_plots(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `psnr_histogram.png`, `psnr_by_frame.png`, and, if there are groups of frames, `ssim_by_position.png` into `folder`."""
    folder.mkdir()
    overall = summary["overall"]
    name = summary["network"]["network"]
    written = [
        _save_plot(folder / "psnr_histogram.png", f"{name}: PSNR of clips", lambda axes: _histogram(axes, overall))
    ]
    curves = {"all": overall} if len(summary["buckets"]) == 1 else summary["buckets"]
    written.append(
        _save_plot(folder / "psnr_by_frame.png", f"{name}: PSNR over time", lambda axes: _over_time(axes, curves))
    )
    if overall["ssim_by_position"]:
        title = f"{name}: SSIM by position in a group of frames"
        written.append(_save_plot(folder / "ssim_by_position.png", title, lambda axes: _positions(axes, overall)))
    return written


def _save_plot(path: Path, title: str, draw: Any) -> Path:
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    draw(axes)
    figure.savefig(path)
    return path


def _histogram(axes: Axes, overall: dict[str, Any]) -> None:
    starts = [float(text) for text in overall["psnr_histogram"]]
    axes.bar(starts, list(overall["psnr_histogram"].values()), width=0.5, align="edge", color=BAR)
    axes.axvline(overall["psnr"]["mean"], color="black", linestyle="--", label=f"mean {overall['psnr']['mean']:.2f} dB")
    axes.set_xlabel("PSNR of a clip, dB")
    axes.set_ylabel("clips")
    axes.legend()


def _over_time(axes: Axes, curves: dict[str, dict[str, Any]]) -> None:
    for name, summary in curves.items():
        axes.plot(summary["psnr_by_frame"], marker="o", markersize=3, label=name)
    axes.set_xlabel("frame of the clip")
    axes.set_ylabel("mean PSNR, dB")
    if len(curves) > 1:
        axes.legend()


def _positions(axes: Axes, overall: dict[str, Any]) -> None:
    values = overall["ssim_by_position"]
    axes.bar(range(1, len(values) + 1), values, color=BAR)
    margin = max(overall["ssim_margin"], 0.002)
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_xticks(range(1, len(values) + 1))
    axes.set_xlabel("position in the group")
    axes.set_ylabel("mean SSIM")
