"""Tables of text embeddings: keys, tensors, what is refused; which latents a trainer's model takes."""

import hashlib
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import ConfigError, InputError
from pipeline.export import texts as texts_module
from pipeline.export.fastvideo import MODELS
from pipeline.export.models import choose_model
from pipeline.export.texts import TextTable
from tests.export.memory_rows import SOURCE, MemoryRows, text_of, wan_row, with_source, write_texts

ROOT = Path(__file__).resolve().parents[2]
ROWS = [wan_row(f"r{n}-0000-aa") for n in range(7)]


@pytest.mark.parametrize("key", ["id", "caption", "caption_hash"])
def test_embeddings_are_found_by_each_key_in_any_row_group(tmp_path, key):
    path = write_texts(tmp_path / "t.parquet", ROWS, 4, key="id" if key == "id" else "caption", row_group_size=2)
    if key == "caption_hash":
        table = pq.read_table(path)
        hashes = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in table["caption"].to_pylist()]
        pq.write_table(table.drop(["caption"]).append_column(key, pa.array(hashes)), path, row_group_size=2)
    table = TextTable(path)
    for row in [*ROWS, ROWS[0], ROWS[6]]:
        assert torch.equal(table.tensors(row)["embedding"], text_of(row, 4))
    assert table.position(wan_row("other-0000-aa")) is None
    assert (table.width, table.dtype) == (4, "bfloat16")
    if key != "id":
        assert table.position(wan_row("none", caption=None)) is None


def test_tables_that_are_not_as_described(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR?")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        TextTable(path)
    write_texts(path, ROWS, 4)
    whole = pq.read_table(path)
    for table, message in [
        (whole.drop(["id"]), "expected one of id, caption, caption_hash"),
        (whole.append_column("caption", whole["id"]), "expected one of id"),
        (whole.drop(["embedding_shape"]), "embedding_bytes, embedding_shape, embedding_dtype"),
        (pa.concat_tables([whole, whole.slice(2, 1)]), "rows 2 and 7 have the same id"),
        (
            pa.concat_tables([whole, whole.slice(0, 1).set_column(0, "id", [[None]]).cast(whole.schema)]),
            "row 7 has key None",
        ),
        (whole.slice(0, 0), "the table is empty"),
    ]:
        pq.write_table(table, path)
        with pytest.raises(InputError, match=message):
            TextTable(path)
    wide = write_texts(tmp_path / "wide.parquet", ROWS[:2], 5)
    pq.write_table(pa.concat_tables([whole.slice(3), pq.read_table(wide)]), path)
    with pytest.raises(InputError, match=r"one width and type of embeddings, got 4 \(bfloat16\), 5 \(bfloat16\)"):
        TextTable(path)
    monkeypatch.setattr(texts_module, "LARGEST_GROUP", 100)
    with pytest.raises(InputError, match=r"write it with smaller ones, e.g. .*row_group_size"):
        TextTable(wide)


def test_bytes_that_do_not_fit_their_shape(tmp_path):
    path = write_texts(tmp_path / "t.parquet", ROWS[:1], 4)
    table = pq.read_table(path)
    at = table.column_names.index("embedding_bytes")
    pq.write_table(table.set_column(at, "embedding_bytes", pa.array([b"123"])), path)
    with pytest.raises(InputError, match="row 0 has 3 bytes for embedding bfloat16 of shape"):
        TextTable(path).tensors(ROWS[0])


def test_the_table_of_the_document_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = re.search(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)[1]
    embedded = [(row.caption, text_of(row, 4).float().numpy()) for row in ROWS]
    exec(compile(recipe, "docs/export.md", "exec"), {"embedded": embedded})
    table = TextTable("texts.parquet")
    assert all(torch.equal(table.tensors(row)["embedding"], text_of(row, 4).float()) for row in ROWS)


def test_the_model_follows_from_the_network_or_is_asked_for():
    assert choose_model(SOURCE, MODELS, None, None)[0].name == "wan"
    assert choose_model(SOURCE, MODELS, "custom", "model")[0].normalize
    rows = MemoryRows()
    own = with_source(rows, network_class=None, spec={**SOURCE.spec, "network": "leanvae-dim16"}).source
    with pytest.raises(
        ConfigError, match="--as: none of the trainer's models is known to use latents of leanvae-dim16"
    ):
        choose_model(own, MODELS, None, None)
    with pytest.raises(ConfigError, match="the model wan takes raw latents, so there is no choice"):
        choose_model(SOURCE, MODELS, "wan", "model")
    with pytest.raises(ConfigError, match=r"--as: expected one of wan, hunyuan, cosmos, ltx2, custom, got 'flux'"):
        choose_model(SOURCE, MODELS, "flux", None)
