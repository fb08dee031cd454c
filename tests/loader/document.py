"""Python blocks of docs/loader.md."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "loader.md"
READERS = ("datasets", "ray.data", "webdataset", "accelerate", "lightning")


def blocks(*readers: str) -> list[str]:
    """Blocks in order, those of other readers only where named."""
    found = [part.partition("```")[0] for part in DOCUMENT.read_text().split("```python\n")[1:]]
    return [block for block in found if not any(f"import {name}" in block for name in READERS if name not in readers)]
