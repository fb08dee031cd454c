"""Training runs: stopping, continuing and sharing among processes change nothing; a broken step is refused and named."""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
from copy import deepcopy
from itertools import pairwise
from math import isfinite
from pathlib import Path

import pytest
import torch

import model
from model.training import losses, run_folder
from model.training.batches import MicroBatchDataset, stage_schedules
from model.training.learner import Learner
from model.training.run_folder import RunFolder
from model.training.source import Clip
from model.training.trainer import train
from pipeline.synthetic_videos.source import SyntheticSource
from tests.model.training_process import CONFIG, one_adversarial_step, recipe


def lines(folder):
    """Logged values by step, without times."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "waited")} for line in found]


class Remembered:
    """Clips generated once for all runs in this module."""

    def __init__(self, source):
        self._clip = functools.cache(source.clip)

    def clip(self, *which):
        return self._clip(*which)


CLIPS = Remembered(SyntheticSource(5))


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(recipe(), CLIPS, folder, loaders=0)
    return folder


class Stopped(Exception):
    pass


def stop_at(step):
    def on_step(now, values):
        if now == step:
            raise Stopped

    return on_step


@pytest.mark.parametrize("step", [7, 16])  # in the first stage, in the other
def test_a_stopped_run_continues_to_the_same_weights(whole, tmp_path, step):
    with pytest.raises(Stopped):
        train(recipe(checkpoint_every=4), CLIPS, tmp_path / "run", loaders=0, on_step=stop_at(step))
    train(recipe(), CLIPS, tmp_path / "run", loaders=0)
    assert lines(tmp_path / "run") == lines(whole)
    same_state(RunFolder(tmp_path / "run").load(20), RunFolder(whole).load(20))


def test_a_checkpoint_is_read_to_the_cpu(whole, monkeypatch):
    """From a GPU, optimizers would keep their step counts there and wait for them in every step."""
    places = []

    def load(path, *, map_location, weights_only):
        places.append(map_location)
        return whole_load(path, map_location=map_location, weights_only=weights_only)

    whole_load = torch.load
    monkeypatch.setattr(torch, "load", load)
    train(recipe(), CLIPS, whole, loaders=0)  # loads the last state; no step is left
    assert places == ["cpu"]


def same_state(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            same_state(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        for one, other in zip(ours, theirs, strict=True):
            same_state(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_two_processes_train_like_one(whole, tmp_path):
    """Half of each step's micro-batches each: gradients are summed in another order."""
    command = [sys.executable, "-m", "tests.model.training_process", str(tmp_path / "run"), str(tmp_path / "meeting")]
    ranks = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    assert [int(line) for line in ranks.stdout.splitlines()] == list(range(1, 21)), "the first rank reports"
    for ours, theirs in zip(lines(tmp_path / "run"), lines(whole), strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        # rounding grows where two networks play against each other
        assert ours == pytest.approx(theirs, rel=1e-3 if ours["step"] <= 10 else 5e-2, abs=1e-4)
    ours, theirs = (RunFolder(folder).load(20)["average"] for folder in (tmp_path / "run", whole))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4)
    # LeCam's running means do not depend on who computed which of a step's four micro-batches
    train(one_adversarial_step(), CLIPS, tmp_path / "alone", loaders=0)
    shared, alone = (RunFolder(tmp_path / name).load(1)["objective"]["lecam"] for name in ("run-one", "alone"))
    assert alone["real"] != 0
    assert shared == alone


def test_published_weights_encode(whole):
    """The weights are the averaged ones, better than the start, and a checkpoint like any other."""
    vae = model.load("leanvae", str(whole / "weights"))
    source, network = CLIPS, RunFolder(whole).load(20)["network"]
    assert any(not torch.equal(network[key], value) for key, value in vae_weights(whole).items())
    video = source.clip(0, 5, 32, 32).video_CTHW[None].float() / 255 - 0.5
    decoded, _ = vae.decode(vae.encode(video)[0].mean)
    assert (decoded - video).square().mean() < 0.25 * video.var()
    assert (whole / "sheets" / "step-000000020.png").stat().st_size > 1000
    assert list((whole / "tensorboard").iterdir())


def vae_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "weights" / "model.safetensors")


def test_logs_the_terms_of_each_stage(whole):
    assert [line["stage"] for line in lines(whole)] == ["reconstruction"] * 10 + ["adversarial"] * 10
    assert "gan" not in lines(whole)[9]
    ours, theirs = ({"gan", "gan_weight", "loss", "gradient"}, {"hinge", "lecam", "discriminator_gradient"})
    for autoencoder, discriminator in zip(lines(whole)[10::2], lines(whole)[11::2], strict=True):
        assert ours <= set(autoencoder)
        assert theirs <= set(discriminator)
        assert not ours & set(discriminator)
        assert not theirs & set(autoencoder)


def test_alternating_steps_are_logged_in_pairs(tmp_path):
    second = recipe().to_dict()["stages"][1]
    train(recipe(stages=[second | {"steps": 7}], start={}, log_every=4), CLIPS, tmp_path / "run", loaders=0)
    assert [line["step"] for line in lines(tmp_path / "run")] == [3, 4, 6, 7]


def test_a_discriminator_step_leaves_the_autoencoder_as_it_is():
    learner = Learner(recipe(stages=recipe().to_dict()["stages"][1:]), CLIPS, torch.device("cpu"), None, first=False)
    learner.distribute(1)
    learner.start_stage(0)
    batches = MicroBatchDataset(CLIPS, stage_schedules(learner.recipe.stages, 5)[0], 5)
    states = [deepcopy(learner.state_dict())]
    for step in range(2):
        learner.accumulate(batches[step], step, share=1.0, last=True)
        learner.clip_gradients(step)
        learner.update(step)
        states.append(deepcopy(learner.state_dict()))
    names = ("network", "optimizers", "average", "objective", "discriminator")
    changed = [[name for name in names if not equal(old[name], new[name])] for old, new in pairwise(states)]
    # the discriminator's norms count the batches that the autoencoder's step passes through it
    assert changed == [["network", "optimizers", "average", "objective"], ["objective", "discriminator"]]
    older = {"opponent" if name == "discriminator" else name: value for name, value in states[1].items()}
    learner.load_state_dict(older)
    assert equal(learner.state_dict(), states[1])


def equal(ours, theirs):
    try:
        same_state(ours, theirs)
    except AssertionError:
        return False
    return True


def test_an_adaptive_weight_after_a_compiled_stage_without_one(monkeypatch):
    """The first stage compiles a backward pass that the second one's, which keeps its graph, must be able to use."""
    import torch._functorch.config

    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager")
    )  # no C++ compiler's minute
    first, second = recipe().to_dict()["stages"]
    group = first["groups"][:1]
    second["objective"]["adversarial"]["alternate"] = False
    stages = [stage | {"steps": 1, "warm_up": 0, "groups": group} for stage in (first, second)]
    learner = Learner(recipe(stages=stages, compile=True), CLIPS, torch.device("cpu"), None, first=False)
    learner.distribute(1)
    for number, table in enumerate(stage_schedules(learner.recipe.stages, 5)):
        learner.start_stage(number)
        values = learner.accumulate(MicroBatchDataset(CLIPS, table, 5)[0], 0, share=1.0, last=True)
        assert isfinite(learner.clip_gradients(0)["gradient"])
        learner.update(0)
    assert values["gan_weight"] > 0


class Always:
    """The same clip for every number."""

    def clip(self, index, frames, height, width):
        return CLIPS.clip(3, frames, height, width)


def test_training_reduces_the_loss(tmp_path):
    """On one clip seen repeatedly, flipped or not, from random weights; published averages are better than the start too."""
    stage = recipe().to_dict()["stages"][0] | {"steps": 40, "learning_rate": 3e-3, "final_learning_rate": 3e-3}
    stage |= {"groups": stage["groups"][:1], "batches": 1}
    train(recipe(stages=[stage], start={}), Always(), tmp_path / "run", loaders=0)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert max(losses[-5:]) < 0.7 * min(losses[:3])
    vae = model.load("leanvae", str(tmp_path / "run" / "weights"))
    video = CLIPS.clip(3, 5, 32, 32).video_CTHW[None].float() / 255 - 0.5
    decoded, _ = vae.decode(vae.encode(video)[0].mean)
    assert (decoded - video).abs().mean() < 0.7 * lines(tmp_path / "run")[0]["l1"]


@pytest.mark.parametrize(("change", "kept"), [({}, True), ({"new_discriminator": True}, False)])
def test_a_discriminator_is_kept_only_for_the_same_architecture(change, kept):
    """It is kept from stage to stage with its optimizer's moments, unless its architecture changes."""
    second = recipe().to_dict()["stages"][1]
    stages = [second, second | {"name": "again"} | change, second | {"name": "other"}]
    stages[2]["objective"] = second["objective"] | {"adversarial": second["objective"]["adversarial"] | {"channels": 5}}
    learner = Learner(recipe(stages=stages), CLIPS, torch.device("cpu"), None, first=False)
    learner.distribute(1)
    learner.start_stage(0)
    first = learner.state_dict()
    with torch.no_grad():
        first["objective"]["network"]["layers.0.weight"].add_(1.0)
    before = first["objective"]["network"]["layers.0.weight"].clone()
    learner.start_stage(1)
    assert torch.equal(learner.state_dict()["objective"]["network"]["layers.0.weight"], before) == kept
    learner.start_stage(2)
    assert learner.state_dict()["objective"]["network"]["layers.0.weight"].shape[0] == 5


def test_requirements_of_later_stages_are_checked_at_the_start():
    first, second = recipe().to_dict()["stages"]
    late = recipe(stages=[first, second | {"objective": {"terms": {"lpips": 1.0}}}])
    with pytest.raises(ValueError, match="weights LPIPS, but its weights were not given"):
        Learner(late, CLIPS, torch.device("cpu"), None, first=False)


def test_a_discriminator_too_deep_for_its_clips_is_refused_at_once():
    first, second = recipe().to_dict()["stages"]
    second["objective"]["adversarial"] |= {"layers": 6}
    with pytest.raises(ValueError, match=r"patch2d with 6 layers cannot process 2 clips of 5x32x32 \(.*fewer layers"):
        Learner(recipe(stages=[first, second]), CLIPS, torch.device("cpu"), None, first=False)


def test_a_loss_that_is_not_finite_leaves_no_finite_gradient(monkeypatch):
    """In no process: gradients are all that processes exchange. A loss that overflows may have finite gradients."""
    short = recipe(start={})
    learner = Learner(short, CLIPS, torch.device("cpu"), None, first=True)
    learner.distribute(1)
    learner.start_stage(0)
    batch = MicroBatchDataset(CLIPS, stage_schedules(short.stages, 5)[0], 5)[0]
    monkeypatch.setattr(losses, "kl_divergence", lambda posterior: posterior.mean.mean().float() * 0 + float("inf"))
    values = learner.accumulate(batch, 0, share=1.0, last=True)
    assert torch.isinf(values["loss"])
    assert not isfinite(learner.clip_gradients(0)["gradient"])


def test_a_folder_of_another_recipe_is_refused(whole):
    with pytest.raises(ValueError, match=r"another recipe \(config: was .*'latent_dim': 4.*is .*'latent_dim': 5"):
        train(recipe(config=CONFIG | {"latent_dim": 5}), CLIPS, whole)
    with pytest.raises(ValueError, match="seed: was 3, is 4"):
        train(recipe(seed=4), CLIPS, whole)


def test_a_run_without_a_checkpoint_may_change_its_recipe(tmp_path):
    """Left over from a first attempt that failed or was killed at once."""
    files = RunFolder(tmp_path)
    (tmp_path / "recipe.yaml.partial").write_text("net")
    files.prepare(recipe())
    files.prepare(recipe(seed=4))
    with files.locked():
        files.save(1, {}, keep=1)
    with pytest.raises(ValueError, match="seed: was 4, is 3"):
        files.prepare(recipe())


def test_a_folder_is_locked_by_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.0)
    files = RunFolder(tmp_path)
    files.prepare(recipe())
    with files.locked():
        for wanted in (recipe(), recipe(seed=4)):
            with pytest.raises(ValueError, match="in use by a run in another process; wait for it"):
                train(wanted, CLIPS, tmp_path, loaders=0)
    with files.locked():  # let go of
        pass


@pytest.mark.parametrize("part", ["publish", "save"])
def test_weights_are_those_of_the_last_step_wherever_a_kill_falls(tmp_path, monkeypatch, part):
    short = recipe(4, checkpoint_every=3, start={})

    def killed(self, *arguments, **named):
        if 4 in arguments or arguments[-1] == {"network": "leanvae", "seed": 3, "steps": 4}:
            raise Stopped
        return whole_part(self, *arguments, **named)

    whole_part = getattr(RunFolder, part)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, part, killed)
        with pytest.raises(Stopped):
            train(short, CLIPS, tmp_path / "run", loaders=0)
    train(short, CLIPS, tmp_path / "run", loaders=0)
    assert json.loads((tmp_path / "run" / "weights" / "run.json").read_text())["steps"] == 4
    newest = tmp_path / "run" / "checkpoints" / "step-000000004.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"000000004.pt is damaged \(5000 bytes.* remove it"):
        train(short, CLIPS, tmp_path / "run", loaders=0)


def test_a_full_disk_has_a_clear_error(tmp_path):
    """As torch and safetensors see it: a file that cannot grow."""
    files, before = RunFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    files.prepare(recipe())
    files.metrics.touch()
    tensors = {"a": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-000000001.pt could not be written .*the disk has \d+ bytes free"):
            files.save(1, tensors, keep=1)
        with pytest.raises(OSError, match=r"model.safetensors could not be written"):
            files.publish({}, tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(ValueError, match="is not empty and is not a run"):
        train(recipe(), CLIPS, tmp_path)


class Poisoned:
    """Source whose clip 9 has the wrong dtype."""

    def __init__(self, bad):
        self.bad = bad

    def clip(self, index, frames, height, width):
        video = torch.randint(0, 255, (3, frames, height, width), generator=torch.Generator().manual_seed(index))
        return Clip(f"clip-{index}", self.bad(video) if index == 9 else video.to(torch.uint8))


def test_an_invalid_clip_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"clip clip-9 as torch.float32 .*expected uint8 \(3, "):
        train(recipe(), Poisoned(lambda video: video.float()), tmp_path / "run", loaders=0)


def test_a_non_finite_step_stops_the_run_and_is_named(tmp_path):
    """A rate that makes parameters overflow; step and clips are named, the last checkpoint stays finite."""
    stages = [dict(stage) for stage in recipe().to_dict()["stages"]]
    stages[0] |= {"learning_rate": 1e30, "final_learning_rate": 1e30}
    wild = recipe(stages=stages, checkpoint_every=1, optimizer={"name": "adamw"})
    with pytest.raises(
        FloatingPointError, match=r"step (\d+) is not finite \(.*loss.*clips: synthetic/5/\d+, synth"
    ) as error:
        train(wild, CLIPS, tmp_path / "run", loaders=0)
    step = int(str(error.value).split()[1])
    assert RunFolder(tmp_path / "run").last_step() == step - 1


def test_processes_must_divide_the_micro_batches(monkeypatch, tmp_path):
    from model.training import trainer

    monkeypatch.setattr(trainer.Ranks, "current", classmethod(lambda cls: cls(0, 3)))
    with pytest.raises(ValueError, match="2 micro-batches a step, which 3 processes cannot share"):
        train(recipe(), CLIPS, tmp_path / "run")
