"""Videos in, latents out: `encode(job) -> BuildReport`, `EncodeJob`. Latents into training: `LatentDataset`, `LatentLoader`.

Importing this package loads neither torch nor ray.

The packages are described in docs/architecture.md; what they exchange is in `records`. Beside them: `errors` (every failure) and `units`
(sizes and durations as text).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.engine.driver.encode import encode
    from pipeline.engine.driver.report import BuildReport
    from pipeline.loader.dataset import LatentDataset
    from pipeline.loader.loader import LatentLoader

__all__ = ["BuildReport", "EncodeJob", "LatentDataset", "LatentLoader", "encode"]

_HOMES = {
    "EncodeJob": "pipeline.config",
    "encode": "pipeline.engine.driver.encode",
    "BuildReport": "pipeline.engine.driver.report",
    "LatentDataset": "pipeline.loader.dataset",
    "LatentLoader": "pipeline.loader.loader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
