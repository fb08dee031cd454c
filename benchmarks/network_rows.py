"""Rows of `networks.py`: one measured case each, as a line of its table and as RESULT lines."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_DIFFERENCE = 1e-5  # float32, relative to the largest latent


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are medians in seconds of one step of `batch` clips."""

    network: str
    clip: str
    direction: str
    dtype: str
    batch: int
    seconds: float
    frames_per_s: float
    peak_mb: float
    tflop_per_s: float | None
    of_matrix_rate: float | None
    of_plain: float | None = None  # speed per clip against the plain network (same device; `plain_dtype`)
    plain_dtype: str | None = None
    difference: float | None = None  # largest, relative to the largest latent of the plain network


HEADER = (
    f"{'network':<16}{'clip':<14}{'direction':<16}{'dtype':<10}{'batch':>5}{'ms':>9}{'frames/s':>10}{'peak MB':>9}"
    f"{'TFLOP/s':>9}{'of mm':>7}{'x plain':>9}{'difference':>12}"
)


def show(rows: list[Row]) -> list[Row]:
    """Prints the rows and returns them."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        print(
            f"{row.network:<16}{row.clip:<14}{row.direction:<16}{row.dtype:<10}{row.batch:>5}{1e3 * row.seconds:>9.0f}"
            f"{row.frames_per_s:>10.1f}{row.peak_mb:>9.0f}{cell(row.tflop_per_s, '.3f'):>9}{cell(row.of_matrix_rate, '.2f'):>7}"
            f"{cell(row.of_plain, '.2f'):>9}{cell(row.difference, '.1e'):>12}",
            flush=True,
        )
    return rows


def results(rows: list[Row]) -> list[str]:
    """RESULT lines of what was compared with the plain network."""
    lines = []
    for row in (row for row in rows if row.of_plain is not None and "plain" not in row.direction):
        case = f"{row.network} {row.direction} of {row.clip}, {row.dtype}"
        lines.append(f"RESULT {row.of_plain:.2f} speed of {case}, of the plain network in {row.plain_dtype}")
        if row.dtype == "float32" and row.difference is not None:
            lines.append(
                f"RESULT {row.difference:.1e} <= {LARGEST_DIFFERENCE} difference of {case}, of the largest latent"
            )
    return lines
