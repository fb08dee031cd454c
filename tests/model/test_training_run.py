"""A run that is stopped and continued, or shared out among processes, is the run that was neither; a broken step is refused and named."""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
from math import isfinite
from pathlib import Path

import pytest
import torch

import model
from model.training import losses, run_folder
from model.training.batches import MicroBatches, timetables
from model.training.learner import Learner
from model.training.run_folder import RunFolder
from model.training.source import Clip, SyntheticSource
from model.training.trainer import train
from tests.model.training_process import CONFIG, recipe


def lines(folder):
    """Logged values by step, without how long they took."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "waited")} for line in found]


class Remembered:
    """Clips that are made once for all runs here."""

    def __init__(self, source):
        self._clip = functools.cache(source.clip)

    def clip(self, *which):
        return self._clip(*which)


CLIPS = Remembered(SyntheticSource(5))


@pytest.fixture(scope="module", autouse=True)
def one_thread_from_the_start():
    """Fixtures of the module are made before the folder's own rule holds; sums are split as threads are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
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
def test_continues_where_it_was_stopped(whole, tmp_path, step):
    with pytest.raises(Stopped):
        train(recipe(checkpoint_every=4), CLIPS, tmp_path / "run", loaders=0, on_step=stop_at(step))
    train(recipe(), CLIPS, tmp_path / "run", loaders=0)
    assert lines(tmp_path / "run") == lines(whole)
    same_state(RunFolder(tmp_path / "run").load(20, "cpu"), RunFolder(whole).load(20, "cpu"))


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


def start(folder, meeting="", rank=0, world=1, loaders=0):
    """A training process, told to speak of every step."""
    command = [sys.executable, "-m", "tests.model.training_process", str(folder), str(meeting)]
    numbers = [str(number) for number in (rank, world, loaders)]
    return subprocess.Popen([*command, *numbers], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


def test_two_processes_are_one(whole, tmp_path):
    """Half of each step's micro-batches each: gradients are sums in another order."""
    with (
        start(tmp_path / "run", tmp_path / "meeting", 0, 2) as first,
        start(tmp_path / "run", tmp_path / "meeting", 1, 2) as second,
    ):
        assert [int(line) for line in first.stdout] == list(range(1, 21))
        assert second.stdout.read() == ""
    assert (first.returncode, second.returncode) == (0, 0)
    for ours, theirs in zip(lines(tmp_path / "run"), lines(whole), strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        # rounding grows where two networks play against each other
        assert ours == pytest.approx(theirs, rel=1e-3 if ours["step"] <= 10 else 5e-2, abs=1e-4)
    ours, theirs = (RunFolder(folder).load(20, "cpu")["average"] for folder in (tmp_path / "run", whole))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4)


def test_publishes_what_encodes(whole):
    """The weights are averaged ones, better than the start, and a checkpoint as any other."""
    vae = model.load("leanvae", str(whole / "weights"))
    source, network = CLIPS, RunFolder(whole).load(20, "cpu")["network"]
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
    assert {"gan", "gan_weight", "hinge", "lecam", "discriminator_gradient"} <= set(lines(whole)[10])


class Always:
    """One and the same clip, whatever its number."""

    def clip(self, index, frames, height, width):
        return CLIPS.clip(3, frames, height, width)


def test_the_loss_falls(tmp_path):
    """On a clip that is seen again and again, mirrored or not; from chance, and published averages are better than the start too."""
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
def test_a_discriminator_goes_on_or_not(change, kept):
    """From stage to stage, with its optimizer's moments; one of another make never."""
    second = recipe().to_dict()["stages"][1]
    stages = [second, second | {"name": "again"} | change, second | {"name": "other"}]
    stages[2]["objective"] = second["objective"] | {"adversarial": second["objective"]["adversarial"] | {"channels": 5}}
    learner = Learner(recipe(stages=stages), CLIPS, torch.device("cpu"), None, first=False)
    learner.distribute(1)
    learner.enter(0)
    first = learner.state_dict()
    with torch.no_grad():
        first["objective"]["network"]["layers.0.weight"].add_(1.0)
    before = first["objective"]["network"]["layers.0.weight"].clone()
    learner.enter(1)
    assert torch.equal(learner.state_dict()["objective"]["network"]["layers.0.weight"], before) == kept
    learner.enter(2)
    assert learner.state_dict()["objective"]["network"]["layers.0.weight"].shape[0] == 5


def test_what_a_later_stage_lacks_is_missed_at_once():
    first, second = recipe().to_dict()["stages"]
    late = recipe(stages=[first, second | {"objective": {"terms": {"lpips": 1.0}}}])
    with pytest.raises(ValueError, match="weight for LPIPS, whose weights were not given"):
        Learner(late, CLIPS, torch.device("cpu"), None, first=False)


def test_a_discriminator_too_deep_for_its_clips_is_refused_at_once():
    first, second = recipe().to_dict()["stages"]
    second["objective"]["adversarial"] |= {"layers": 6}
    with pytest.raises(ValueError, match=r"a patch2d of 6 layers cannot judge 2 clips of 5x32x32 \(.*fewer layers"):
        Learner(recipe(stages=[first, second]), CLIPS, torch.device("cpu"), None, first=False)


def test_a_loss_that_is_not_finite_leaves_no_finite_gradient(monkeypatch):
    """In no process: gradients are all that processes exchange. What overflows may have a gradient that does not."""
    short = recipe(start={})
    learner = Learner(short, CLIPS, torch.device("cpu"), None, first=True)
    learner.distribute(1)
    learner.enter(0)
    batch = MicroBatches(CLIPS, timetables(short.stages, 5)[0], 5)[0]
    monkeypatch.setattr(losses, "kl_divergence", lambda posterior: posterior.mean.mean().float() * 0 + float("inf"))
    values = learner.accumulate(batch, 0, share=1.0, last=True)
    assert torch.isinf(values["loss"])
    assert not isfinite(learner.gradient_lengths(0)["gradient"])


def test_refuses_another_recipe(whole):
    with pytest.raises(ValueError, match=r"another recipe \(config: was .*'latent_dim': 4.*is .*'latent_dim': 5"):
        train(recipe(config=CONFIG | {"latent_dim": 5}), CLIPS, whole)
    with pytest.raises(ValueError, match="seed: was 3, is 4"):
        train(recipe(seed=4), CLIPS, whole)


def test_what_was_never_learned_from_may_become_another_run(tmp_path):
    """Whatever is left of a first attempt that failed or was killed at once."""
    files = RunFolder(tmp_path)
    (tmp_path / "recipe.yaml.partial").write_text("net")
    files.begin(recipe())
    files.begin(recipe(seed=4))
    with files.held():
        files.save(1, {}, keep=1)
    with pytest.raises(ValueError, match="seed: was 4, is 3"):
        files.begin(recipe())


def test_one_run_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.0)
    files = RunFolder(tmp_path)
    files.begin(recipe())
    with files.held():
        for wanted in (recipe(), recipe(seed=4)):
            with pytest.raises(ValueError, match="a run that is under way in another process; wait for it"):
                train(wanted, CLIPS, tmp_path, loaders=0)
    with files.held():  # let go of
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
    with pytest.raises(ValueError, match=r"000000004.pt is damaged: 5000 bytes .* remove it"):
        train(short, CLIPS, tmp_path / "run", loaders=0)


def test_a_full_disk_is_said(tmp_path):
    """As torch and safetensors find it: a file that may not grow."""
    files, before = RunFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    files.begin(recipe())
    files.metrics.touch()
    tensors = {"a": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-000000001.pt could not be written, on a disk with \d+ bytes free"):
            files.save(1, tensors, keep=1)
        with pytest.raises(OSError, match=r"model.safetensors could not be written"):
            files.publish({}, tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_refuses_a_folder_with_other_things(tmp_path):
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(recipe(), CLIPS, tmp_path)


class Poisoned:
    """A source that is fine until its clip 9, which is of the wrong kind."""

    def __init__(self, bad):
        self.bad = bad

    def clip(self, index, frames, height, width):
        video = torch.randint(0, 255, (3, frames, height, width), generator=torch.Generator().manual_seed(index))
        return Clip(f"clip-{index}", self.bad(video) if index == 9 else video.to(torch.uint8))


def test_a_broken_clip_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"clip clip-9 as torch.float32 .*expected uint8 \(3, "):
        train(recipe(), Poisoned(lambda video: video.float()), tmp_path / "run", loaders=0)


def test_stops_at_what_is_not_finite(tmp_path):
    """A rate that makes parameters overflow; the step and the clips are named, the last checkpoint stays finite."""
    stages = [dict(stage) for stage in recipe().to_dict()["stages"]]
    stages[0] |= {"learning_rate": 1e30, "final_learning_rate": 1e30}
    wild = recipe(stages=stages, checkpoint_every=1, optimizer={"name": "adamw"})
    with pytest.raises(
        FloatingPointError, match=r"step (\d+) is not finite \(.*loss.*clips: synthetic/5/\d+, synth"
    ) as error:
        train(wild, CLIPS, tmp_path / "run", loaders=0)
    step = int(str(error.value).split()[1])
    assert RunFolder(tmp_path / "run").last_step() == step - 1


def test_processes_must_share_a_step(monkeypatch, tmp_path):
    from model.training import trainer

    monkeypatch.setattr(trainer.Ranks, "here", classmethod(lambda cls: cls(0, 3)))
    with pytest.raises(ValueError, match="2 micro-batches a step, which 3 processes cannot share"):
        train(recipe(), CLIPS, tmp_path / "run")
