"""A disk that is full while an export is written: one line for every format, and the same command goes on."""

import pytest

from pipeline.errors import BuildError
from pipeline.export.automodel import AutoModel
from pipeline.export.fastvideo import FastVideo
from pipeline.export.ltx2 import Ltx2
from pipeline.export.musubi import Musubi
from pipeline.export.texts import TextTable
from tests.export.memory_rows import MemoryRows, run, wan_row, write_texts
from tests.export.test_export_ltx2 import SOURCE, ltx_row
from tests.pipeline.test_scratch import largest_file


@pytest.mark.parametrize("target", [AutoModel, FastVideo, Ltx2, Musubi])
def test_it_is_one_line_and_the_same_command_goes_on(target, tmp_path):
    large = {"frames": 17, "height": 64, "width": 96}
    rows = MemoryRows(SOURCE, [ltx_row("a")]) if target is Ltx2 else MemoryRows(rows=[wan_row("a", **large)])
    width = 2048 if target is Ltx2 else 4096
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, width, tokens=4 if target is Ltx2 else None))
    with (
        largest_file(4000),
        pytest.raises(BuildError, match=r"cannot be written: .*File too large; the same command goes on"),
    ):
        run(target, rows, tmp_path / "out", texts=texts)
    assert BuildError.exit_code == 1
    assert run(target, rows, tmp_path / "out", texts=texts).added == 1
