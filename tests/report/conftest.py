"""Fixtures of tests of reports: one hostile output, and its report without pictures."""

from __future__ import annotations

import pytest

from pipeline.config import StorageConfig
from pipeline.report.collect import ReportOptions, collect
from pipeline.report.values import Report
from pipeline.storage import Store
from tests.report.outputs import hostile_output

WITHOUT_PICTURES = ReportOptions(clips=0)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return hostile_output(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="session")
def report(hostile: Store) -> Report:
    found, pictures = collect(hostile, None, StorageConfig(), WITHOUT_PICTURES)
    assert not pictures.by_name
    return found
