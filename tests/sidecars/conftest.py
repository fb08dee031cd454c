"""Small encoders, saved once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sidecars import encoders


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "t5": encoders.save_t5(folder / "t5"),
        "umt5": encoders.save_t5(folder / "umt5", "umt5"),
        "clip": encoders.save_clip_text(folder / "clip"),
        "gemma": encoders.save_gemma(folder / "gemma"),
        "clip_vision": encoders.save_clip_vision(folder / "clip_vision"),
    }
