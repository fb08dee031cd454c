"""What learns: the autoencoder, its averaged weights, the discriminator, and the optimizers of both.

Enters: micro-batches. Leaves: parameters that have moved, and every term's value. All that a continuation needs is in `state_dict`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.training.objective import Objective
from model.training.optimisation import Optimizers, learning_rate
from model.training.starting import begin, to_pixels, to_range

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from model.training.batches import MicroBatch
    from model.training.perceptual import LPIPS
    from model.training.recipe import Stage, TrainingRecipe
    from model.training.source import ClipSource

# Norms' running means are of no consequence in training; sending them between two calls would spoil the first one's gradients.
_NAME = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
NO_BUFFERS: dict[str, Any] = {_NAME: False}
NOISE, LOOKED_AT = 3, 4  # what is drawn with the seed, beside groups and crops in `batches`


class Learner:
    """The changing half of a run.

    Attributes:
        network: the autoencoder. device: of everything. stage: the one it is in, after `enter`.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        source: ClipSource,
        device: torch.device,
        lpips: LPIPS | None,
        *,
        first: bool,
    ) -> None:
        """As the recipe starts; by chance alone where `first` is false, for a state that is loaded or received.

        Raises:
            ValueError: a recipe whose start, optimizer or objective do not fit its network.
        """
        self.recipe, self.device, self.stage, self._number = recipe, device, recipe.stages[0], -1
        self.network = begin(recipe, source, first=first)
        self.spec, self._lpips = self.network.spec, lpips
        for stage in recipe.stages:  # what only a later one lacks is missed now, and not after days
            objective = self._to_minimise(stage)
            for group in stage.groups:
                objective.check_clips(group.batch, group.frames, group.height, group.width)
        self._module = cast("nn.Module", self.network).to(device).train()
        self._optimizers = Optimizers(self._module, recipe.optimizer)
        self._average: AveragedModel | None = None
        self._objective: Objective | None = None
        self._opponent: Optimizers | None = None  # the discriminator's
        self._shared: nn.Module = self._module  # what is called: wrapped where processes share a step
        self._judge: nn.Module | None = None  # the discriminator, wrapped alike
        self._world = 1

    # ---- stages and processes ---------------------------------------------------------------------------------------

    def distribute(self, world: int) -> None:
        """Makes this process one of `world`; parameters become those of rank 0. Once, before the first stage."""
        self._world = world
        self._shared = self._wrapped(self._module)
        if self.recipe.compile:
            self._shared = cast("nn.Module", torch.compile(self._shared))
        if self.recipe.ema is not None and self._average is None:
            self._average = AveragedModel(self._module, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema))

    def enter(self, number: int) -> None:
        """Turns to a stage's objective. A discriminator of the same make as the last stage's goes on learning."""
        before, make = self._objective, _make(self._objective)
        self.stage, self._number = self.recipe.stages[number], number
        objective = self._to_minimise(self.stage).to(self.device)
        self._objective = objective
        if before is not None and make is not None and _make(objective) == make and not self.stage.new_discriminator:
            objective.load_state_dict(before.state_dict())
            moments = cast("Optimizers", self._opponent).state_dict()
        else:
            moments = None
        self._opponent, self._judge = None, None
        if objective.network is not None:
            self._opponent = Optimizers(objective.network, self.recipe.discriminator_optimizer)
            if moments is not None:
                self._opponent.load_state_dict(moments)
            self._judge = self._wrapped(objective.network)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def accumulate(self, batch: MicroBatch, step: int, *, share: float, last: bool) -> dict[str, torch.Tensor]:
        """Adds a micro-batch's gradients, times `share`; processes exchange theirs with the `last` one. Leaves values of all terms."""
        objective = self._active()
        original = to_range(batch.video_BCTHW.to(self.device, non_blocking=True), self.spec)
        with self._quiet(self._shared, last=last):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                found = self._shared(original, self._noise(original, batch.number))
            loss, values = objective.generator(
                original,
                found.video_BCTHW,
                found.posterior,
                found.coefficients,
                step=step,
                generator=self._draw(LOOKED_AT, batch.number),
                last_layer=self.network.last_layer(),
            )
            (loss * _spoiled(share, loss)).backward()
        if objective.adversarial_at(step) and self._judge is not None:
            with self._quiet(self._judge, last=last):
                answer, more = objective.discriminator(
                    original, found.video_BCTHW.detach(), step=step, network=self._judge
                )
                (answer * _spoiled(share, answer)).backward()
            values |= more
        return values | {"psnr": _psnr(original, found.video_BCTHW.detach(), self.spec.value_range)}

    def gradient_lengths(self, step: int) -> dict[str, float]:
        """Of both gradients, which are shortened as the recipe says; not finite where anything in them is not."""
        lengths = {"gradient": float(self._optimizers.clip())}
        if self._opponent is not None and self._active().adversarial_at(step):
            lengths["discriminator_gradient"] = float(self._opponent.clip())
        return lengths

    def move(self, step: int) -> float:
        """Parameters and averages take a step (`step` within the stage). Leaves the learning rate."""
        rate = learning_rate(self.stage, step)
        self._optimizers.step(rate)
        if self._opponent is not None and self._active().adversarial_at(step):
            self._opponent.step(self.stage.discriminator_learning_rate or rate)
        if self._average is not None:
            self._average.update_parameters(self._module)
        return rate

    # ---- what it has learned ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """uint8 `B 3 T H W` through the published weights and back."""
        network = self._average.module if self._average is not None else self._module
        found = network(to_range(video_BCTHW.to(self.device), self.spec))
        return to_pixels(found.video_BCTHW, self.spec).cpu()

    def weights(self) -> dict[str, torch.Tensor]:
        """What a run publishes, by published key: averaged where the recipe averages."""
        return (self._average.module if self._average is not None else self._module).state_dict()

    def state_dict(self) -> dict[str, Any]:
        """All of it: tensors and plain data."""
        return {
            "stage": self._number,
            "network": self._module.state_dict(),
            "optimizers": self._optimizers.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "objective": self._active().state_dict(),
            "opponent": None if self._opponent is None else self._opponent.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`, in its stage. After `distribute`."""
        self._module.load_state_dict(state["network"])
        self._optimizers.load_state_dict(state["optimizers"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.enter(int(state["stage"]))
        self._active().load_state_dict(state["objective"])
        if self._opponent is not None:
            self._opponent.load_state_dict(state["opponent"])

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _active(self) -> Objective:
        if self._objective is None:
            raise RuntimeError("enter a stage first")
        return self._objective

    def _to_minimise(self, stage: Stage) -> Objective:
        return Objective(stage.objective, self.spec.value_range, lpips=self._lpips, seed=self.recipe.seed)

    def _wrapped(self, module: nn.Module) -> nn.Module:
        if self._world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, **NO_BUFFERS)

    def _quiet(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Gradients stay in this process until the last micro-batch of a step."""
        wrapped = getattr(module, "_orig_mod", module)
        if last or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return cast("AbstractContextManager[None]", wrapped.no_sync())

    def _noise(self, video: torch.Tensor, number: int) -> torch.Tensor:
        """What a micro-batch's latents are drawn with; made on the CPU, so that every device draws the same."""
        spec, (B, _, T, H, W) = self.spec, video.shape
        side = spec.space_stride
        shape = (B, spec.latent_channels, spec.latent_frames(T), H // side, W // side)
        return torch.randn(shape, generator=self._draw(NOISE, number)).to(self.device)

    def _draw(self, purpose: int, number: int) -> torch.Generator:
        words = np.random.SeedSequence([self.recipe.seed, purpose, self._number, number])
        return torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))


def _make(objective: Objective | None) -> tuple[Any, ...] | None:
    """What a discriminator must share with another to take over its parameters."""
    adversarial = None if objective is None else objective.recipe.adversarial
    return None if adversarial is None else (adversarial.discriminator, adversarial.channels, adversarial.layers)


def _spoiled(share: float, loss: torch.Tensor) -> torch.Tensor:
    """`share`, not finite where the loss is not: so neither is any gradient, in any process, not even where the loss's own are finite."""
    return share + 0.0 * loss.detach()


@torch.no_grad()
def _psnr(original: torch.Tensor, reconstruction: torch.Tensor, value_range: tuple[float, float]) -> torch.Tensor:
    """dB, of the mean squared error over all pixels of the micro-batch, values kept to the range."""
    low, high = value_range
    error = (reconstruction.clamp(low, high) - original).square().mean() / (high - low) ** 2
    return -10.0 * error.clamp_min(1e-12).log10()
