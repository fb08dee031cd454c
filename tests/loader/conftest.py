"""Outputs that many tests of the loader only read: written once."""

from __future__ import annotations

import pytest

from pipeline.config import WriteConfig
from tests.loader.outputs import Output, mixed_shards, write_output

CONFIGS = {
    "parquet": WriteConfig(),
    "moments": WriteConfig(dtype="bfloat16", moments=True),
    "tar": WriteConfig(format="tar"),
    "tar_moments": WriteConfig(format="tar", dtype="float32", moments=True),
}


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Output]:
    """Outputs of 12 images, 18 short and 15 wide clips in 3 shards."""
    folder = tmp_path_factory.mktemp("films")
    return {
        name: write_output(
            folder / name, folder / "spool", mixed_shards(dtype=config.dtype, moments=config.moments), config
        )
        for name, config in CONFIGS.items()
    }
