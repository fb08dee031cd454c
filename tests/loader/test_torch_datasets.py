"""The loader and its rows as torch datasets: plain `DataLoader` with processes, iterable datasets with a state."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.errors import ConfigError
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import LatentDataset, LatentLoader
from tests.loader.document import blocks
from tests.loader.outputs import mixed_shards, write_output
from tests.pipeline.latent_clips import values_of


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_go_through_a_plain_data_loader(films, workers):
    dataset = LatentDataset.open(films["moments"].uri, where="num_frames = 9 and width = 24", columns=("fps",))
    rows = dataset.as_map_dataset()
    assert len(rows) == 18
    seen = []
    for batch in DataLoader(rows, batch_size=4, shuffle=True, num_workers=workers):
        for value, logvar, name in zip(batch["latent"], batch["logvar"], batch["id"], strict=True):
            clip = films["moments"].clips[name]
            assert np.array_equal(value.float().numpy(), values_of(clip.latent_CTHW, "bfloat16"))
            assert np.array_equal(logvar.float().numpy(), values_of(clip.logvar_CTHW, "bfloat16"))
        seen += batch["id"]
        assert batch["fps"].tolist() == [8.0] * len(batch["id"])
    assert sorted(seen) == sorted(row.id for row in dataset.rows(tensors=False))
    with pytest.raises(IndexError):
        rows[18]
    assert rows[-1]["id"] == [row.id for row in dataset.rows(tensors=False)][-1]


def test_rows_that_were_taken_down_are_not_items(tmp_path):
    output = write_output(tmp_path / "out", tmp_path, mixed_shards(2))
    record_takedown(output.store, "asked", ids=["video00003-0000", "video00107-0000"])
    rows = LatentDataset.open(output.uri).as_map_dataset()
    found = [rows[i]["id"] for i in range(len(rows))]
    assert sorted(found) == sorted(set(output.clips) - {"video00003-0000", "video00107-0000"})


def test_an_iterable_dataset_gives_the_batches_and_keeps_the_step(films):
    def loader():
        return LatentLoader(LatentDataset.open(films["parquet"].uri), batch=4)

    whole = [batch.ids for batch in islice(loader(), 8)]
    dataset = loader().as_iterable_dataset()
    through = DataLoader(dataset, batch_size=None, num_workers=0)
    assert [batch.ids for batch in islice(through, 3)] == whole[:3]
    again = loader().as_iterable_dataset()
    again.load_state_dict(dataset.state_dict())
    batches = list(islice(DataLoader(again, batch_size=None), 5))
    assert [batch.ids for batch in batches] == whole[3:]
    assert isinstance(batches[0].latents, torch.Tensor)
    with pytest.raises(ConfigError, match="num_workers: expected 0"):
        next(iter(DataLoader(again, batch_size=None, num_workers=1)))


def test_a_stateful_data_loader_saves_and_restores_the_step(films):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def through():
        loader = LatentLoader(LatentDataset.open(films["parquet"].uri), batch=4, prefetch=2)
        return StatefulDataLoader(loader.as_iterable_dataset(), batch_size=None, num_workers=0)

    whole = [batch.ids for batch in islice(through(), 8)]
    first = through()
    assert [batch.ids for batch in islice(first, 3)] == whole[:3]
    again = through()
    again.load_state_dict(first.state_dict())
    assert [batch.ids for batch in islice(again, 5)] == whole[3:]


def run_block_of_the_document(framework, films, tmp_path, monkeypatch):
    """Names that the block of docs/loader.md for this framework makes, beside the output `out`."""
    Path(tmp_path, "out").symlink_to(films["parquet"].uri)
    monkeypatch.chdir(tmp_path)
    scope = {"LatentDataset": LatentDataset, "LatentLoader": LatentLoader, "DataLoader": DataLoader}
    exec(next(block for block in blocks(framework) if f"import {framework}" in block), scope)
    return scope


def test_checkpoints_of_accelerate_have_the_step(films, tmp_path, monkeypatch):
    scope = run_block_of_the_document("accelerate", films, tmp_path, monkeypatch)
    loader, accelerator = scope["loader"], scope["accelerator"]
    whole = [batch.ids for batch in islice(loader, 3)]
    accelerator.save_state("checkpoint")
    whole += [batch.ids for batch in islice(loader, 3)]
    loader.seek(0)
    accelerator.load_state("checkpoint")
    assert [batch.ids for batch in islice(loader, 3)] == whole[3:]


@pytest.mark.parametrize("saved_at", [4, 6])
def test_checkpoints_of_lightning_have_the_step(films, tmp_path, monkeypatch, saved_at):
    lightning = pytest.importorskip("lightning.pytorch")
    scope = run_block_of_the_document("lightning", films, tmp_path, monkeypatch)
    steps, trainer = [], scope["trainer"]

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch, _):
            steps.append(batch.step)
            return (self.factor * batch.latents.float()).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    class Saving(lightning.Callback):
        """Within the second epoch, or at the end of the first."""

        def on_train_batch_end(self, trainer, model, outputs, batch, number):
            if batch.step == saved_at == 6:
                trainer.save_checkpoint("saved.ckpt")

        def on_train_epoch_end(self, trainer, model):
            if trainer.current_epoch == 0 and saved_at == 4:
                trainer.save_checkpoint("saved.ckpt")

    trainer.callbacks.append(Saving())
    trainer.fit(Model(), datamodule=scope["Latents"]())
    assert steps == list(range(10))
    steps.clear()
    lightning.Trainer(max_epochs=2, limit_train_batches=5).fit(
        Model(), datamodule=scope["Latents"](), ckpt_path="saved.ckpt"
    )
    assert steps == list(range(saved_at + 1, 10))
