"""Fixtures of the pipeline's tests."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.pipeline.frameless_build import make_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> SimpleNamespace:
    """Six small files, an output, and a way to run builds without frames over them."""
    return make_workspace(tmp_path)
