"""Fixtures of the pipeline's tests."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.pipeline.frameless_build import make_world


@pytest.fixture
def world(tmp_path: Path) -> SimpleNamespace:
    """Six small files, an output, and a way to run builds without frames over them."""
    return make_world(tmp_path)
