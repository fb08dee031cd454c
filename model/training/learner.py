"""Trained state of a run: autoencoder, averaged weights, discriminator, and their optimizers.

Takes micro-batches, updates parameters, and returns the value of every loss term. `state_dict` holds all a continuation needs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.training.objective import Objective
from model.training.optimisation import Optimizers, learning_rate
from model.training.starting import start_network, to_pixels, to_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from model.metrics.perceptual import LPIPS
    from model.training.batches import MicroBatch
    from model.training.recipe import Stage, TrainingRecipe
    from model.training.source import ClipSource

# Do not broadcast BatchNorm buffers: they do not affect training, and the in-place update between two forwards would invalidate
# the first graph.
_BUFFER_OPTION = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
NO_BUFFERS: dict[str, Any] = {_BUFFER_OPTION: False}
NOISE, FRAME_CHOICE, DROPOUT = 3, 4, 5  # purposes of seeded draws; `batches` has the others


class Learner:
    """Networks and optimizers of a run.

    Attributes:
        network: the autoencoder. device: of all tensors. stage: the current one, after `start_stage`.
    """

    def __init__(
        self, recipe: TrainingRecipe, source: ClipSource, device: torch.device, lpips: LPIPS | None, *, first: bool
    ) -> None:
        """Network as the recipe starts it; with `first` false randomly initialised only, because a state will be loaded or received.

        Raises:
            ValueError: the recipe's start, optimizer or objective does not fit its network.
        """
        self.recipe, self.device, self.stage, self._number = recipe, device, recipe.stages[0], -1
        self.network = start_network(recipe, source, first=first)
        self.spec, self._lpips = self.network.spec, lpips
        for stage in recipe.stages:  # check all stages now, not when a later one starts after days
            objective = self._objective_of(stage)
            for group in stage.groups:
                objective.check_clips(group.batch, group.frames, group.height, group.width)
        self._module = cast("nn.Module", self.network).to(device).train()
        self._optimizers = Optimizers(self._module, recipe.optimizer)
        self._average: AveragedModel | None = None
        self._objective: Objective | None = None
        self._discriminator_optimizers: Optimizers | None = None
        self._shared: nn.Module = self._module  # the autoencoder, wrapped if processes share a step
        self._discriminator: nn.Module | None = None  # wrapped likewise
        self._world = 1
        self._logits: list[
            torch.Tensor
        ] = []  # mean logits (2,), real and fake, of this step's micro-batches in this process

    # ---- stages and processes ---------------------------------------------------------------------------------------

    def distribute(self, world: int) -> None:
        """Makes this process one of `world`; all take the parameters of rank 0. Call once, before the first stage."""
        self._world = world
        self._shared = self._distributed(self._module)
        if self.recipe.compile:
            self._shared = self._compiled(self._shared)
        if self.recipe.ema is not None and self._average is None:
            self._average = AveragedModel(self._module, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema))

    def start_stage(self, number: int) -> None:
        """Switches to a stage's objective. A discriminator of the same architecture as the last stage's is kept."""
        before, architecture = self._objective, _architecture(self._objective)
        self.stage, self._number = self.recipe.stages[number], number
        objective = self._objective_of(self.stage).to(self.device)
        self._objective = objective
        if (
            before is not None
            and architecture is not None
            and _architecture(objective) == architecture
            and not self.stage.new_discriminator
        ):
            objective.load_state_dict(before.state_dict())
            moments = cast("Optimizers", self._discriminator_optimizers).state_dict()
        else:
            moments = None
        self._discriminator_optimizers, self._discriminator = None, None
        if objective.discriminator is not None:
            self._discriminator_optimizers = Optimizers(objective.discriminator, self.recipe.discriminator_optimizer)
            if moments is not None:
                self._discriminator_optimizers.load_state_dict(moments)
            self._discriminator = self._distributed(objective.discriminator)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def accumulate(self, batch: MicroBatch, step: int, *, share: float, last: bool) -> dict[str, torch.Tensor]:
        """Adds a micro-batch's gradients, times `share`; gradients are exchanged with the `last` one. Returns the values of all terms.

        The step trains the autoencoder, the discriminator or both, as the objective says.
        """
        objective, values = self._active(), dict[str, torch.Tensor]()
        original = to_range(batch.video_BCTHW.to(self.device, non_blocking=True), self.spec)
        trains = objective.trains_autoencoder(step)
        with self._no_sync(self._shared, last=last), self._seeded(DROPOUT, batch.number):
            with (
                torch.set_grad_enabled(trains),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"),
            ):
                output = self._shared(original, self._noise(original, batch.number))
            if trains:
                loss, values = objective.generator_loss(
                    original,
                    output.video_BCTHW,
                    output.posterior,
                    output.coefficients,
                    step=step,
                    generator=self._generator(FRAME_CHOICE, batch.number),
                    last_layer=self.network.last_layer(),
                )
                (loss * _nan_if_not_finite(share, loss)).backward()
            if objective.trains_discriminator(step):
                values |= self._accumulate_discriminator(original, output.video_BCTHW.detach(), step, share, last=last)
        return values | {"psnr": _psnr(original, output.video_BCTHW.detach(), self.spec.value_range)}

    def _accumulate_discriminator(
        self, original: torch.Tensor, reconstruction: torch.Tensor, step: int, share: float, *, last: bool
    ) -> dict[str, torch.Tensor]:
        discriminator = cast("nn.Module", self._discriminator)
        with self._no_sync(discriminator, last=last):
            loss, values = self._active().discriminator_loss(
                original, reconstruction, step=step, discriminator=discriminator
            )
            (loss * _nan_if_not_finite(share, loss)).backward()
        self._logits.append(torch.stack([values["logits_real"], values["logits_fake"]]).double())
        return values

    def clip_gradients(self, step: int) -> dict[str, float]:
        """Clips the step's gradients to the recipe's length; returns their norms before, non-finite if any gradient is."""
        lengths: dict[str, float] = {}
        if self._active().trains_autoencoder(step):
            lengths["gradient"] = float(self._optimizers.clip())
        if self._discriminator_optimizers is not None and self._active().trains_discriminator(step):
            lengths["discriminator_gradient"] = float(self._discriminator_optimizers.clip())
        return lengths

    def update(self, step: int) -> float:
        """Updates parameters and averages (`step` within the stage). Returns the learning rate."""
        rate, objective = learning_rate(self.stage, step), self._active()
        if objective.trains_autoencoder(step):
            self._optimizers.step(rate)
            if self._average is not None:
                self._average.update_parameters(self._module)
        if self._discriminator_optimizers is not None and objective.trains_discriminator(step):
            self._discriminator_optimizers.step(self.stage.discriminator_learning_rate or rate)
            objective.end_step(self._mean_logits())
        return rate

    # ---- results ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Reconstructs uint8 `B 3 T H W` with the weights a run publishes."""
        network = self._average.module if self._average is not None else self._module
        output = network(to_range(video_BCTHW.to(self.device), self.spec))
        return to_pixels(output.video_BCTHW, self.spec).cpu()

    def weights(self) -> dict[str, torch.Tensor]:
        """Weights that a run publishes, by published key: averaged if the recipe averages."""
        return (self._average.module if self._average is not None else self._module).state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Everything a continuation needs, as tensors and plain data."""
        return {
            "stage": self._number,
            "network": self._module.state_dict(),
            "optimizers": self._optimizers.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "objective": self._active().state_dict(),
            "discriminator": None
            if self._discriminator_optimizers is None
            else self._discriminator_optimizers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`, in its stage. Call after `distribute`."""
        self._module.load_state_dict(state["network"])
        self._optimizers.load_state_dict(state["optimizers"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.start_stage(int(state["stage"]))
        self._active().load_state_dict(state["objective"])
        if self._discriminator_optimizers is not None:
            self._discriminator_optimizers.load_state_dict(
                state["discriminator"]
                if "discriminator" in state
                else state["opponent"]  # its name in older checkpoints
            )

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _active(self) -> Objective:
        if self._objective is None:
            raise RuntimeError("no stage is active; call start_stage first")
        return self._objective

    def _objective_of(self, stage: Stage) -> Objective:
        return Objective(stage.objective, self.spec.value_range, lpips=self._lpips, seed=self.recipe.seed)

    def _compiled(self, module: nn.Module) -> nn.Module:
        """`torch.compile` of the autoencoder."""
        if any(stage.objective.adversarial and stage.objective.adversarial.adaptive for stage in self.recipe.stages):
            # Adaptive weights keep the graph for a second backward pass. A backward pass that an earlier stage compiled without one
            # frees ("donates") buffers of the forward pass, and then refuses to run.
            import torch._functorch.config

            torch._functorch.config.donated_buffer = False
        return cast("nn.Module", torch.compile(module))

    def _mean_logits(self) -> torch.Tensor:
        """Mean logits (2,) over the step's micro-batches of all processes, added in the micro-batches' order: the same for any number."""
        own, self._logits = torch.stack(self._logits), []
        everyone = [own]
        if self._world > 1:
            everyone = [torch.empty_like(own) for _ in range(self._world)]
            torch.distributed.all_gather(everyone, own)
        return torch.stack(everyone, dim=1).flatten(0, 1).mean(0)

    def _distributed(self, module: nn.Module) -> nn.Module:
        if self._world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, **NO_BUFFERS)

    def _no_sync(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Context that keeps gradients in this process until the last micro-batch of a step."""
        wrapped = getattr(module, "_orig_mod", module)
        if last or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return cast("AbstractContextManager[None]", wrapped.no_sync())

    def _noise(self, video: torch.Tensor, number: int) -> torch.Tensor:
        """Noise for a micro-batch's latents; drawn on the CPU, so that it is the same on every device."""
        spec, (B, _, T, H, W) = self.spec, video.shape
        side = spec.space_stride
        shape = (B, spec.latent_channels, spec.latent_frames(T), H // side, W // side)
        return torch.randn(shape, generator=self._generator(NOISE, number)).to(self.device)

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose, number))

    @contextmanager
    def _seeded(self, purpose: int, number: int) -> Iterator[None]:
        """Context in which torch's global generator draws for this micro-batch; its own state comes back afterwards."""
        adversarial = self._active().recipe.adversarial
        if adversarial is None or not adversarial.dropout:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._seed(purpose, number))
            yield

    def _seed(self, purpose: int, number: int) -> int:
        words = np.random.SeedSequence([self.recipe.seed, purpose, self._number, number])
        return int(words.generate_state(1, np.uint64)[0] >> 1)


def _architecture(objective: Objective | None) -> tuple[Any, ...] | None:
    """Properties that a discriminator must share with another to take over its parameters."""
    adversarial = None if objective is None else objective.recipe.adversarial
    if adversarial is None:
        return None
    return adversarial.discriminator, adversarial.channels, adversarial.layers, adversarial.dropout > 0


def _nan_if_not_finite(share: float, loss: torch.Tensor) -> torch.Tensor:
    """`share`, or NaN if the loss is not finite, so that every rank sees a non-finite gradient."""
    return share + 0.0 * loss.detach()


@torch.no_grad()
def _psnr(original: torch.Tensor, reconstruction: torch.Tensor, value_range: tuple[float, float]) -> torch.Tensor:
    """PSNR in dB of the mean squared error over all pixels of the micro-batch, values clamped to the range."""
    low, high = value_range
    error = (reconstruction.clamp(low, high) - original).square().mean() / (high - low) ** 2
    return -10.0 * error.clamp_min(1e-12).log10()
