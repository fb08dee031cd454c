"""Recipes: impossible ones are refused; rates and schedules are the documented functions."""

from __future__ import annotations

from collections import Counter
from math import cos, pi

import pytest
import torch
import yaml

from model.training.batches import MicroBatchDataset, RankSampler, stage_schedules
from model.training.optimisation import Optimizers, learning_rate
from model.training.recipe import RECIPES, differences, load_recipe, training_recipe
from model.training.source import Clip
from tests.model.training_process import CONFIG, recipe


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_built_in_recipes_are_valid(name):
    found = load_recipe(name)
    assert training_recipe(yaml.safe_load(yaml.safe_dump(found.to_dict()))) == found


def test_overrides_merge_by_key():
    found = load_recipe("leanvae-mini", {"seed": 4, "config": {"latent_dim": 8}, "optimizer": {"name": "adamw"}})
    plain = load_recipe("leanvae-mini")
    assert (found.seed, found.config["latent_dim"], found.optimizer.name) == (4, 8, "adamw")
    assert found.config["l_dim"] == plain.config["l_dim"]
    assert found.optimizer.betas == plain.optimizer.betas
    assert [change.split(":")[0] for change in differences(plain, found)] == ["config", "seed", "optimizer"]
    assert differences(plain, load_recipe("leanvae-mini", {"log_every": 3, "checkpoint_every": 7})) == []


def test_overrides_find_stages_by_name():
    plain = load_recipe("leanvae").to_dict()
    second = plain["stages"][1]["name"]
    found = load_recipe("leanvae", {"stages": {second: {"steps": 7, "warm_up": 0}}}).to_dict()
    assert found["stages"][1] == plain["stages"][1] | {"steps": 7, "warm_up": 0}
    assert found["stages"][0] == plain["stages"][0]
    with pytest.raises(ValueError, match=f"no stage is named third; expected one of .*{second}"):
        load_recipe("leanvae", {"stages": {"third": {"steps": 7}}})


def test_an_unknown_recipe_is_refused():
    with pytest.raises(FileNotFoundError, match=r"no recipe 'leenvae'.*leanvae-mini"):
        load_recipe("leenvae")


def broken(**changes):
    return recipe().to_dict() | changes


def broken_stage(**changes):
    first, second = recipe().to_dict()["stages"]
    return broken(stages=[first | changes, second])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (broken(optimiser={}), "optimiser: no such key"),
        (broken_stage(objective={"terms": {"l3": 1.0}}), "stages.0.objective: .*unknown term 'l3'"),
        (broken_stage(objective={"weights": {}}), "unknown keys weights"),
        (broken_stage(groups=[]), "stages.0.groups"),
        (broken_stage(groups=[{"frames": 8, "height": 32, "width": 32, "batch": 1}]), "takes 4n.1 frames, got 8"),
        (broken_stage(groups=[{"frames": 9, "height": 36, "width": 32, "batch": 1}]), "multiples of 8, got height 36"),
        (broken_stage(name="adversarial"), "need different names"),
        (broken_stage(learning_rate=1e-9), "must not exceed learning_rate 1e-09"),
        (broken_stage(learning_rate=float("inf")), "learning_rate: Input should be a finite number, got inf$"),
        (broken_stage(objective=None), "objective must be a mapping with terms, .*; got None$"),
        (
            broken_stage(objective={"terms": {"l1": 1, "wl": 1}}),
            "term wl, which needs a WF-VAE's .*; leanvae has none$",
        ),
        (
            broken_stage(objective={"terms": {"l1": 1}, "adversarial": {"weight": 1, "lecam_decay": 1}}),
            r"lecam_decay must be in \[0, 1\), got 1$",
        ),
        (
            broken_stage(objective={"terms": {"l1": 1}, "adversarial": {"weight": 1, "adaptive": "yes"}}),
            "adaptive must be true or false, got 'yes'$",
        ),
        (
            broken_stage(objective={"terms": {"kl": "1e-7"}}),
            r"terms.kl must be .*, got '1e-7' \(YAML .*write 1.0e-7\)$",
        ),
        (broken(stages=[]), "stages: Tuple should have at least 1 item"),
        ({1: 2}, "expected a mapping with network, .*, got {1: 2}$"),
        (None, "expected a mapping with network, .*, got None$"),
        (broken_stage(decay_steps=2), "decay_steps must exceed warm_up 2, got 2"),
        (broken_stage(warm_up=11), "must not exceed the stage's 10 steps, got 11"),
        (broken(start={"linear": 4, "image": "x"}), "start takes one of .*; got linear and image"),
        (broken(network="leenvae"), "leenvae"),
        (broken(config=CONFIG | {"latent_dim": 0}), "latent_dim must be a whole number of at least 1, got 0$"),
        (broken(ema=1.5), "recipe: ema: Input should be less than 1, got 1.5"),
        ({"network": "leanvae-dim4"}, "recipe: stages: is required"),
    ],
)
def test_impossible_recipes_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        training_recipe(section)


def test_learning_rates_follow_warm_up_and_cosine():
    stage = recipe().stages[0].model_copy(update={"steps": 13, "warm_up": 2, "learning_rate": 1.0})
    rates = [learning_rate(stage, step) for step in range(13)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(1e-4 + 0.9999 * 0.5 * (1 + cos(pi / 2)))
    assert rates[-1] == pytest.approx(1e-4)
    # decaying in fewer steps than there are, or in more
    soon, late = (stage.model_copy(update={"decay_steps": steps}) for steps in (8, 23))
    assert [learning_rate(soon, step) for step in (6, 7, 8, 12)][1:] == pytest.approx([1e-4] * 3)
    assert learning_rate(soon, 6) > 1e-3
    assert learning_rate(late, 12) == pytest.approx(1e-4 + 0.9999 * 0.5)


def test_the_schedule_uses_every_clip_once():
    tables = stage_schedules(recipe(steps=400).stages, seed=3)
    clips, groups = [], Counter()
    for table in tables:
        for number in range(table.stage.steps * table.stage.batches):
            clips += table.clips(number)
            groups[table.group(number).frames] += 1
    assert clips == list(range(len(clips)))
    assert 0.68 < groups[5] / sum(groups.values()) < 0.82  # of 800, three in four; 4.6 deviations
    again = stage_schedules(recipe(steps=400).stages, seed=4)[0]
    assert any(again.group(n) != tables[0].group(n) for n in range(400))


def test_ranks_share_the_micro_batches_of_a_step():
    shares = [list(RankSampler(range(5, 7), 4, rank, 2)) for rank in range(2)]
    assert shares == [[20, 22, 24, 26], [21, 23, 25, 27]]
    assert len(RankSampler(range(5, 7), 4, 0, 2)) == 4


class Ramp:
    """Pixels that encode their position: column in red, row in green."""

    def clip(self, index, frames, height, width):
        columns, rows = torch.arange(width + 20), torch.arange(height + 10)
        video = torch.stack(torch.broadcast_tensors(columns[None], rows[:, None], torch.full((1, 1), index)))
        return Clip(str(index), video[:, None].expand(-1, frames, -1, -1).to(torch.uint8))


def test_clips_are_cropped_and_flipped():
    table = stage_schedules(recipe(steps=100).stages, seed=3)[0]
    batches, corners, mirrored = MicroBatchDataset(Ramp(), table, seed=3), set(), Counter()
    for number in range(100):
        batch = batches[number]
        assert torch.equal(batch.video_BCTHW, batches[number].video_BCTHW)
        assert batch.keys == tuple(map(str, table.clips(number)))
        for video in batch.video_BCTHW:
            red, green = video[0, 0, 0].int(), video[1, 0, :, 0].int()
            steps = set(red.diff().tolist())
            assert steps in ({1}, {-1})
            assert set(green.diff().tolist()) == {1}
            mirrored[steps.pop()] += 1
            corners.add((int(red.min()), int(green[0])))
    assert 0.3 < mirrored[-1] / mirrored.total() < 0.7
    assert {left for left, _ in corners} == set(range(21))
    assert {top for _, top in corners} == set(range(11))


class Counted:
    """Clips whose pixels are the number of their frame; as many frames as it was asked for, or `short` fewer."""

    def __init__(self, short=0):
        self.short = short

    def clip(self, index, frames, height, width):
        numbers = torch.arange(frames - self.short, dtype=torch.uint8)
        return Clip(str(index), numbers[None, :, None, None].expand(3, -1, height, width))


def test_a_frame_interval_takes_every_nth_frame():
    section = recipe(steps=40).to_dict()["stages"][0] | {"frame_interval": 3}
    table = stage_schedules(recipe(stages=[section]).stages, seed=3)[0]
    batches, seen = MicroBatchDataset(Counted(), table, seed=3), set()
    for number in range(8):
        seen.add(tuple(batches[number].video_BCTHW[0, 0, :, 0, 0].tolist()))
    assert seen == {(0, 3, 6, 9, 12), (0,)}  # of clips and of images
    short = MicroBatchDataset(Counted(short=1), table, seed=3)
    number = next(number for number in range(8) if table.group(number).frames == 5)
    with pytest.raises(ValueError, match=r"\(3, 12, 32, 32\), expected uint8 \(3, 13, H, W\)"):
        short[number]


class Tokens(torch.nn.Module):
    """A token layer's matrix, a projection and a bias."""

    def __init__(self):
        super().__init__()
        self.ffd_layer = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
        self.proj = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.proj(self.ffd_layer(x))


def test_muon_updates_token_matrices_equally_in_all_directions():
    torch.manual_seed(0)
    network = Tokens()
    optimizers = Optimizers(network, recipe().optimizer.model_copy(update={"clip": 0.5}))
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    (network(torch.randn(32, 6)) * 100).square().mean().backward()
    assert float(optimizers.clip()) > 0.5
    assert torch.stack([p.grad.norm() for p in network.parameters()]).norm() == pytest.approx(0.5, rel=1e-4)
    uneven = torch.linalg.svdvals(network.ffd_layer[0].weight.grad)[:2]
    optimizers.step(1e-2)
    moved = {name: value.detach() - before[name] for name, value in network.named_parameters()}
    assert moved["proj.bias"].abs().tolist() == pytest.approx([1e-2, 1e-2], rel=1e-3)  # Adam's first step is the rate
    even = torch.linalg.svdvals(moved["ffd_layer.0.weight"])[:2]  # its gradient has rank 2
    assert even[1] / even[0] > 0.9 > 0.6 > uneven[1] / uneven[0]
    assert all(p.grad is None for p in network.parameters())


def test_gains_have_no_weight_decay():
    """Gains of any shape; kernels, also depthwise ones, decay."""
    network = torch.nn.Module()
    shapes = {"gain": (4, 1, 1), "bias": (4,), "step": (), "kernel": (4, 1, 3, 3), "matrix": (4, 2)}
    for name, shape in shapes.items():
        network.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
        network.get_parameter(name).grad = torch.zeros(shape)
    recipe_of = recipe().optimizer.model_copy(update={"name": "adamw", "weight_decay": 0.5})
    Optimizers(network, recipe_of).step(0.1)
    assert {name for name in shapes if float(network.get_parameter(name).detach().max()) < 1} == {"kernel", "matrix"}


def test_muon_needs_token_layers():
    with pytest.raises(ValueError, match="Linear has no token layers for the optimizer muon"):
        Optimizers(torch.nn.Linear(3, 3), recipe().optimizer)
