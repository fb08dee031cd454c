"""HTML page of a report: one file without scripts or pictures from elsewhere, or with its pictures in a folder beside it.

Takes a `Report` and its pictures, gives the page as bytes. All text of the data is escaped, and control characters and marks that turn the
direction of text are written out. A content security policy lets the page load nothing and run only its own script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.parse
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from pipeline.report import charts
from pipeline.report.quality import quality_histogram
from pipeline.units import duration, printable, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.report.pictures import Pictures
    from pipeline.report.values import Report

# Control characters, bytes that are not UTF-8, and what turns the direction of text: a name with it is shown as another one.
# Joiners stay: some scripts need them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LINE_ENDS = re.compile(r"\s+")
GROUPS = {"worst": "Worst by PSNR", "median": "Median", "best": "Best by PSNR", "random": "Random"}
NUMBERS = 12  # of a check, on its line
CHECKS = {
    "conservation": "Inputs that are neither rows nor rejects; counts of receipts, files and rows that differ.",
    "files": "Data files and indexes that are missing, or have another size or other bytes.",
    "removed": "More inputs or rows would be dropped than is allowed.",
    "rejects": "A larger share of damaged inputs than is allowed.",
    "finite": "Latents that are not a number, or infinite.",
    "drift": "New latents whose mean or spread differs from those of the parent.",
    "constants": "Latents that do not fit the constants of the network's authors.",
    "canary": "Clips that, encoded again, give other latents or do not resemble their originals.",
}


def page_of(report: Report, pictures: Pictures, *, assets: str | None = None) -> bytes:
    """The page as UTF-8. `assets`: folder of the pictures, relative to the page; None: they are in the page."""
    clips = report.decoded.clips
    values = {
        "report": report,
        "clips": {title: [clip for clip in clips if clip.shown == name] for name, title in GROUPS.items()},
        "channel_pictures": sorted(
            (name for name in pictures.by_name if name.startswith("channel-")), key=lambda name: int(name[8:])
        ),
        "source": lambda name: _source(pictures, name, assets),
        "charts": charts,
        "meanings": CHECKS,
        "psnr": quality_histogram("PSNR of frames", "dB", (v for clip in clips for v in clip.frame_psnr)),
        "ssim": quality_histogram("SSIM of frames", "1 is equal", (v for clip in clips for v in clip.frame_ssim)),
        "rows": _data(_rows(report)),
    }
    return render("report.html.j2", "report.js", values, images="data:" if assets is None else "data: 'self' file:")


def render(
    template: str, script: str, values: Mapping[str, Any], *, images: str = "'none'", connect: str = "'none'"
) -> bytes:
    """A page from templates of this package, as UTF-8, with style sheet, script and content security policy.

    `images`, `connect`: where it may take pictures from, and what its script may ask, as the policy has it.
    """
    loader = jinja2.PackageLoader("pipeline.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        visible=visible,
        size=size,
        duration=duration,
        length_of=_length,
        cost=_cost,
        count=_count,
        plural=_plural,
        numbers=_numbers,
        share=_share,
        utc=_utc,
        short=_short,
    )
    style, program = (Markup(loader.get_source(environment, name)[0]) for name in ("report.css", script))
    allowed = {
        "default-src": "'none'",
        "img-src": images,
        "connect-src": connect,
        "style-src": _hashed(style),
        "script-src": _hashed(program),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in allowed.items())
    page = environment.get_template(template)
    return page.render(**values, style=style, script=program, policy=policy).encode("utf-8", "backslashreplace")


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def visible(text: object) -> str:
    r"""Text of the data for a page, before it is escaped: white space as one blank, control characters and marks that turn the direction
    of text written out, as `\x1b` and `\u202e`.
    """
    return _UNSAFE.sub(lambda match: printable(match[0]), _LINE_ENDS.sub(" ", "" if text is None else str(text)))


def _source(pictures: Pictures, name: str, assets: str | None) -> str:
    if assets is not None:
        return f"{urllib.parse.quote(assets)}/{name}.webp"
    return f"data:image/webp;base64,{base64.b64encode(pictures.by_name[name]).decode()}"


def _rows(report: Report) -> list[dict[str, Any]]:
    """Rows by column, for the script of the page. Values that repeat, such as sources, are listed once: a third of the bytes."""
    found = []
    for name, *column in zip(report.rows.columns, *report.rows.cells, strict=True):
        cells = [visible(cell) if isinstance(cell, str) else cell for cell in column]
        values = sorted(set(cells), key=str)
        places = {value: place for place, value in enumerate(values)}
        few = 2 * len(values) < len(cells)
        found.append(
            {"name": name, "values": values if few else None, "cells": [places[v] for v in cells] if few else cells}
        )
    return found


def _data(values: Any) -> Markup:
    """JSON for a script element that is not run. Without `<`, nothing in it can end the element."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _count(number: float | None) -> str:
    if number is None:
        return "not known"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def _length(seconds: float) -> str:
    """Length of video, in hours where it is long."""
    if 0 < seconds < 1:
        return "less than 1s"
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else duration(seconds)


def _cost(seconds: float, what: str) -> str:
    """`5.6 core-seconds`, `1,059.2 core-hours`."""
    return f"{seconds / 3600:,.1f} {what}-hours" if seconds >= 3600 else f"{seconds:,.1f} {what}-seconds"


def _plural(number: int, noun: str) -> str:
    return f"{_count(number)} {noun}{'' if number == 1 else 's'}"


def _share(fraction: float) -> str:
    return f"{fraction:.1%}" if fraction >= 0.001 or not fraction else "<0.1%"


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _utc(time: str | None) -> str:
    """`2026-11-29T04:11:18.917184+00:00` -> `2026-11-29 04:11:18 UTC`. All times of records are UTC."""
    return "not known" if not time else f"{time[:19].replace('T', ' ')} UTC"


def _numbers(values: Mapping[str, Any]) -> str:
    """Numbers of a check on one line; those by fingerprint have its first digits before them."""
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += [(f"{name[:8]} {inner}", item) for inner, item in value.items()]
        else:
            flat.append((name, value))
    shown = [(name, value) for name, value in flat if isinstance(value, (int, float))]
    more = f", and {len(shown) - NUMBERS} more" if len(shown) > NUMBERS else ""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}{_unit(name)}" for name, value in shown[:NUMBERS]) + more


def _unit(name: str) -> str:
    return " dB" if "psnr" in name else " s" if name.endswith("_s") else ""
