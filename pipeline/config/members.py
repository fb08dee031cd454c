"""Check of `members` of an `EncodeJob`: names of columns and suffixes of the paired videos of a sample."""

from __future__ import annotations

import re
from typing import Any

from pipeline.records import MAIN, VIDEO_EXTENSIONS
from pipeline.records.members import RESERVED


def check_members(value: dict[Any, Any]) -> dict[str, str]:
    """`value` with suffixes in lower case and without the first dot.

    Raises:
        ValueError: a name that cannot be a column, a suffix that is not that of a video or occurs twice, a main video alone.
    """
    found: dict[str, str] = {}
    for name, raw in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED:
            raise ValueError(
                f"expected names such as control (a-z, 0-9, _) that are not columns of latent files, got {name!r}"
            )
        suffix = raw.lower().removeprefix(".") if isinstance(raw, str) else ""
        if suffix.rpartition(".")[2] not in VIDEO_EXTENSIONS or "/" in suffix:
            raise ValueError(f"{name}: expected the suffix of a video file, such as depth.mp4, got {raw!r}")
        if suffix in found.values():
            raise ValueError(f"{name}: {suffix} is the suffix of another member; each needs its own")
        found[name] = suffix
    if set(found) == {MAIN}:
        raise ValueError(f"expected at least one member besides {MAIN}, such as control: depth.mp4, got {value!r}")
    return found
