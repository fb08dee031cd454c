"""`examples/train_dit.py` on text embeddings of a sidecar set and on what is known of the latents: it uses both, and continues exactly."""

from dataclasses import replace

import pytest
import torch

from examples.flow import sample
from examples.train_dit import Options, Trainer, knowing, loading, train
from examples.training_state import Ranks, RunFolder
from pipeline import LatentDataset, LatentLoader
from pipeline.config import WriteConfig
from pipeline.errors import ConfigError
from pipeline.ledger.receipts import Ledger
from pipeline.records import Bucket
from tests.pipeline.latent_clips import latent_clip, local_store, write_shard
from tests.pipeline.published import publish_all
from tests.sidecars.sets import WIDTH, write_set

CPU = torch.device("cpu")
STORE = ("i2v_cond",)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """Eight latents with conditions, and a set of text embeddings of their captions."""
    folder = tmp_path_factory.mktemp("conditioned")
    store = local_store(folder / "out")
    captions = [f"clip {n % 3}" for n in range(8)]
    clips = [
        latent_clip(n, bucket=Bucket(9, 32, 32), num_frames=9, caption=caption, store=STORE)
        for n, caption in enumerate(captions)
    ]
    Ledger(store).commit(write_shard(store, folder / "spool", WriteConfig(store=STORE), clips))
    publish_all(store)
    write_set(store, [[*sorted(set(captions)), ""]], folder=folder / "sets")
    return str(folder / "out")


@pytest.fixture
def options(conditioned, tmp_path):
    return Options(
        conditioned, str(tmp_path / "run"), steps=6, batch=4, width=32, depth=1, heads=2, warmup=2, checkpoint_every=2,
        samples=0, text="t5", known="i2v_cond",
    )  # fmt: skip


def rows(options, caption_dropout=0.0):
    columns = STORE if options.known == "i2v_cond" else ()
    dataset = LatentDataset.open(options.output, columns=columns)
    with LatentLoader(
        dataset, batch=4, shuffle="none", caption_dropout=caption_dropout, **loading(options, CPU)
    ) as loader:
        return next(iter(loader))


@pytest.mark.parametrize(("text", "known"), [("t5", "i2v_cond"), ("", "first_frame")])
def test_a_continued_run_equals_one_that_was_not_interrupted(options, tmp_path, text, known):
    options = replace(options, text=text, known=known)
    train(replace(options, steps=3))
    train(options)
    other = replace(options, run=str(tmp_path / "other"))
    train(other)
    one, two = (RunFolder(run.run).load({})["network"] for run in (options, other))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_what_is_known_is_the_stored_condition_or_the_first_latent_frame(options):
    for known in ("i2v_cond", "first_frame"):
        trainer = Trainer(replace(options, known=known), Ranks(0, 1, CPU), RunFolder(options.run), 4, WIDTH)
        batch = rows(trainer.options)
        found = trainer._known(batch)
        values, where = found[:, :-1], found[:, -1]
        assert torch.equal(where[:, 0], torch.ones_like(where[:, 0]))
        assert not where[:, 1:].any()
        if known == "i2v_cond":
            assert torch.equal(values, batch.i2v_cond)
        else:
            assert torch.equal(values[:, :, 0], batch.latents[:, :, 0])
            assert not values[:, :, 1:].any()


def test_texts_and_what_is_known_change_what_a_trained_network_gives(options):
    train(replace(options, steps=12))
    trainer = Trainer(options, Ranks(0, 1, CPU), RunFolder(options.run), 4, WIDTH)
    trainer.network.load_state_dict(RunFolder(options.run).load({})["network"])
    batch, empty = rows(options), rows(options, caption_dropout=1.0)
    known, text = trainer._known(batch), trainer._text(batch)
    shape = batch.latents.shape[1:]

    def sampled(text, known):
        return sample(knowing(trainer.network, known.repeat(2, 1, 1, 1, 1)), text, trainer._text(empty), shape, steps=2)

    found = sampled(text, known)
    assert not torch.equal(found, sampled(text, 2 * known))
    assert not torch.equal(found, sampled(text.flip(0), known))
    assert torch.equal(found, sampled(text, known))


def test_conditions_that_are_unknown_or_not_stored_are_refused(options, output):
    with pytest.raises(ConfigError, match="--known: expected nothing, first_frame or i2v_cond, got 'last_frame'"):
        replace(options, known="last_frame")
    with pytest.raises(ConfigError, match=r"i2v_cond.*--store i2v_cond"):
        train(replace(options, output=str(output), text=""))
