"""`examples/train_dit.py` on a published output of real writer files: it learns, it continues exactly, on any number of processes."""

import random
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.dit import caption_words
from examples.train_dit import Options, Trainer, main, parse, train
from examples.training_state import Ranks, RunFolder
from pipeline.errors import ConfigError
from tests.examples import training_process

STEPS = 8


@pytest.fixture
def options(output, tmp_path):
    return Options(
        str(output), str(tmp_path / "run"), steps=STEPS, batch=4, width=32, depth=1, heads=2, warmup=2, checkpoint_every=3,
        samples=0, log_ids=True,
    )  # fmt: skip


def finished(options):
    """Log and checkpoint of a run."""
    files = RunFolder(options.run)
    log = files.read_log()
    for line in log:
        del line["seconds"]
    state = files.load({})
    assert [line["step"] for line in log] == list(range(1, state["step"] + 1))
    return log, state


@pytest.fixture(scope="module")
def whole(output, tmp_path_factory):
    """Log and checkpoint of a run that nothing interrupted, in one process."""
    made = Options(
        str(output), str(tmp_path_factory.mktemp("whole")), steps=STEPS, batch=4, width=32, depth=1, heads=2, warmup=2,
        samples=0, log_ids=True,
    )  # fmt: skip
    train(made)
    return finished(made)


def equal(one, other):
    """Whether two checkpoints have the same bits throughout, but for the settings."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_a_continued_run_equals_one_that_was_not_interrupted_bit_for_bit(options, whole):
    train(replace(options, steps=5))
    train(options)
    log, state = finished(options)
    assert log == whole[0]
    assert equal(state, whole[1])


def test_killed_runs_lose_and_repeat_no_latents(options, whole):
    chosen = random.Random(0)
    files = RunFolder(options.run)
    for _ in range(2):
        process = training_process.start_endless(options)
        lines = min(len(files.read_log()) + chosen.randint(1, 3), STEPS - 1)
        while process.is_alive() and len(files.read_log()) < lines:
            time.sleep(0.01)
        time.sleep(chosen.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(files.read_log()) < STEPS
    training_process.run(options)
    log, state = finished(options)
    assert [line["ids"] for line in log] == [line["ids"] for line in whole[0]]
    assert log == whole[0]
    assert equal(state, whole[1])


def test_two_processes_equal_one_to_rounding_and_may_continue_as_one(options, whole):
    training_process.run(replace(options, steps=5), world=2)
    train(options)
    log, state = finished(options)
    assert [line["ids"] for line in log] == [line["ids"] for line in whole[0]]
    assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in whole[0]], rel=1e-4)
    for name, value in state["network"].items():
        torch.testing.assert_close(value, whole[1]["network"][name], rtol=1e-3, atol=1e-4)


def test_the_loss_falls_on_one_batch(options):
    latents_BCTHW = torch.randn(4, 4, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 2, 4, 4)
    names = ["a", "b", "c", "d"]
    trainer = Trainer(options, Ranks(0, 1, torch.device("cpu")), RunFolder(options.run), channels=4)
    words_BS = caption_words(names, trainer.config.vocabulary)
    losses = [trainer.learn(latents_BCTHW, names, words_BS)["loss"] for _ in range(60)]
    assert losses[0] > 1.5  # at first nothing is predicted: the noise alone has a variance of 1
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_a_run_folder_with_other_settings_is_refused(options):
    files = RunFolder(options.run)
    files.path.mkdir()
    files.save({"settings": {"batch": 4, "seed": 0}})
    with pytest.raises(ConfigError, match=r"batch 4, now 8\); use the same"):
        files.load({"batch": 8, "seed": 0})


def test_a_checkpoint_is_read_to_the_cpu(tmp_path, monkeypatch):
    """From a GPU, AdamW would keep its step counts there and wait for them in every step."""
    files = RunFolder(tmp_path)
    files.save({"settings": {}})
    places = []
    monkeypatch.setattr(torch, "load", lambda path, **how: places.append(how["map_location"]) or {"settings": {}})
    files.load({})
    assert places == ["cpu"]


def test_half_a_line_of_the_log_is_dropped_with_the_steps_after_the_checkpoint(tmp_path):
    files = RunFolder(tmp_path)
    files.log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    files.cut_log(2)
    assert files.read_log() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--heads", "0"], "--heads: expected at least 1, got 0"),
        (["--width", "100"], "--width: expected a multiple of 16 x --heads, which is 96, got 100"),
        (["--warmup", "-1"], "--warmup: expected at least 0, got -1"),
        (["--checkpoint-every", "0"], "--checkpoint-every: expected at least 1, got 0"),
        (["--samples", "-1"], "--samples: expected at least 0, got -1"),
        (["--learning-rate", "nan"], "--learning-rate: expected at least 0, got nan"),
        (["--patch", "3"], "--patch 3: expected frames of multiples of 24 pixels, got buckets "),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line_before_anything_is_written(
    arguments, message, output, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["train_dit", str(output), str(tmp_path / "run"), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"train_dit: error: {message}")
    assert not (tmp_path / "run").exists()


def test_without_a_warm_up_the_first_step_has_the_full_rate(options):
    trainer = Trainer(replace(options, warmup=0), Ranks(0, 1, torch.device("cpu")), RunFolder(options.run), channels=4)
    trainer.learn(torch.randn(1, 4, 2, 4, 4), ["a"], caption_words(["a"], trainer.config.vocabulary))
    assert trainer.optimizer.param_groups[0]["lr"] == options.learning_rate


def test_the_command_line_has_every_option():
    assert parse(["out@3", "run", "--steps", "7", "--learning-rate", "0.5", "--log-ids"]) == Options(
        "out@3", "run", steps=7, learning_rate=0.5, log_ids=True
    )
