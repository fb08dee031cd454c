"""Training objective: the weighted sum of a recipe's terms, for the autoencoder and for the discriminator.

Terms are functions of `model.training.losses` and `model.metrics.perceptual`. Results are a loss with gradients, and the
unweighted value of every term by name, for the logs.
"""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from model.metrics.perceptual import pyramid_distance
from model.training import losses
from model.training.discriminators import DISCRIMINATORS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from model.metrics.perceptual import LPIPS
    from model.posterior import Posterior
    from model.training.objective_recipe import ObjectiveRecipe

    Coefficients = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # of the encoder, of the decoder

GROUP = 4  # frames that LPIPS compares in addition to frame 0
NOT_RECONSTRUCTION = ("kl", "wl")  # terms that adaptive weights leave out of the reconstruction loss (VQGAN equation 7)


class Objective:
    """Objective of one stage. Between steps it keeps only the discriminator and the regulariser's running means.

    Attributes:
        recipe: the recipe. discriminator: the discriminator, or None. lecam: its regulariser, or None.
    """

    def __init__(
        self, recipe: ObjectiveRecipe, value_range: tuple[float, float], *, lpips: LPIPS | None = None, seed: int = 0
    ) -> None:
        """`value_range`: of the videos; `seed`: of the discriminator.

        Raises:
            ValueError: the recipe uses LPIPS and `lpips` is None.
        """
        if recipe.wants("lpips", "lpips_sum") and lpips is None:
            raise ValueError(
                "the recipe weights LPIPS, but its weights were not given: load them with load_lpips(FILE), or remove the terms "
                "lpips and lpips_sum (pyramid needs no weights)"
            )
        self.recipe, self._lpips = recipe, lpips
        (low, high), (black, white) = value_range, recipe.perceptual_range
        self._gain = (white - black) / (high - low)
        self._offset = black - low * self._gain
        self.discriminator: nn.Module | None = None
        self.lecam: losses.LeCam | None = None
        if recipe.adversarial is not None:
            adversarial = recipe.adversarial
            self.discriminator = DISCRIMINATORS[adversarial.discriminator](
                adversarial.channels, adversarial.layers, dropout=adversarial.dropout, seed=seed
            )
            self.lecam = losses.LeCam(adversarial.lecam_decay)

    def to(self, device: torch.device | str) -> Objective:
        """Moves all its modules to a device."""
        for module in (self.discriminator, self.lecam, self._lpips):
            if module is not None:
                module.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """State of a resumed run: discriminator and running means; empty without an adversarial term."""
        if self.discriminator is None or self.lecam is None:
            return {}
        return {"network": self.discriminator.state_dict(), "lecam": self.lecam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`. Raises ValueError for the state of another recipe."""
        expected = () if self.discriminator is None else ("network", "lecam")
        if tuple(state) != expected:
            raise ValueError(
                f"the objective's state holds {list(state)}, expected {list(expected)}; resume with the same recipe"
            )
        if self.discriminator is not None and self.lecam is not None:
            self.discriminator.load_state_dict(state["network"])
            self.lecam.load_state_dict(state["lecam"])

    def adversarial_at(self, step: int) -> bool:
        """Whether the adversarial term is active at this step of the stage."""
        return self.recipe.adversarial is not None and step >= self.recipe.adversarial.start

    def trains_discriminator(self, step: int) -> bool:
        """Whether this step trains the discriminator: while the term is active, every step or, if it alternates, every odd one."""
        adversarial = self.recipe.adversarial
        return self.adversarial_at(step) and adversarial is not None and (not adversarial.alternate or step % 2 == 1)

    def trains_autoencoder(self, step: int) -> bool:
        """Whether this step trains the autoencoder: unless steps alternate and this one is the discriminator's."""
        adversarial = self.recipe.adversarial
        return adversarial is None or not adversarial.alternate or not self.trains_discriminator(step)

    def check_clips(self, batch: int, frames: int, height: int, width: int) -> None:
        """Raises ValueError if the discriminator cannot process `batch` clips of this size. Computes nothing."""
        if self.recipe.adversarial is None or self.discriminator is None:
            return
        discriminator = deepcopy(self.discriminator).to("meta")
        clips = self._discriminator_input(torch.empty((batch, 3, frames, height, width), device="meta"))
        try:
            discriminator(clips)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"objective.adversarial: {self.recipe.adversarial.discriminator} with {self.recipe.adversarial.layers} layers "
                f"cannot process {batch} clips of {frames}x{height}x{width} ({error}); use fewer layers or larger clips"
            ) from error

    def generator_loss(
        self,
        original_BCTHW: torch.Tensor,
        reconstruction_BCTHW: torch.Tensor,
        posterior: Posterior,
        coefficients: Coefficients | None = None,
        *,
        step: int,
        generator: torch.Generator,
        last_layer: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The autoencoder's loss, and {term: unweighted value}, with `gan`, `gan_weight` (as applied) and `loss`.

        `coefficients`: the energy flow's, of encoder and decoder, for the term wl. `step` decides whether the adversarial term is active.
        `generator` draws the group of frames that LPIPS compares. `last_layer`: where an adaptive weight compares gradients.

        Raises:
            ValueError: shapes that differ; a term without its inputs.
        """
        _check_alike(original_BCTHW, reconstruction_BCTHW)
        values = self._terms(original_BCTHW, reconstruction_BCTHW, posterior, coefficients, generator)
        weights = self.recipe.terms
        loss = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        if self.adversarial_at(step):
            reconstruction = [weights[name] * value for name, value in values.items() if name not in NOT_RECONSTRUCTION]
            values["gan"] = self._generator_loss(reconstruction_BCTHW)
            values["gan_weight"] = self._gan_weight(reconstruction, values["gan"], last_layer)
            loss = loss + values["gan_weight"] * values["gan"]
        loss = loss * self._area_factor(original_BCTHW)
        values["loss"] = loss
        return loss, {name: value.detach() for name, value in values.items()}

    def discriminator_loss(
        self,
        original_BCTHW: torch.Tensor,
        reconstruction_BCTHW: torch.Tensor,
        *,
        step: int,
        discriminator: nn.Module | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The discriminator's loss, and {`hinge`, `lecam`, `logits_real`, `logits_fake`, `discriminator_loss`: value}.

        `discriminator` replaces its own, for instance by its wrapper for data-parallel training. `end_step` updates the running means.

        Raises:
            ValueError: shapes that differ, or the term is not active at this step.
        """
        _check_alike(original_BCTHW, reconstruction_BCTHW)
        adversarial, lecam = self.recipe.adversarial, self.lecam
        discriminator = self.discriminator if discriminator is None else discriminator
        if adversarial is None or discriminator is None or lecam is None or not self.adversarial_at(step):
            start = "never" if adversarial is None else f"at step {adversarial.start}"
            raise ValueError(f"the adversarial term starts {start}, got step {step}; check adversarial_at(step) first")
        real = discriminator(self._discriminator_input(original_BCTHW.detach()))
        fake = discriminator(self._discriminator_input(reconstruction_BCTHW.detach()))
        values = {
            "hinge": losses.hinge_discriminator(real, fake),
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
        }
        loss = values["hinge"]
        if adversarial.lecam:
            values["lecam"] = lecam(real, fake)
            loss = loss + adversarial.lecam * values["lecam"]
        values["discriminator_loss"] = loss
        return loss, {name: value.detach() for name, value in values.items()}

    def end_step(self, mean_logits: torch.Tensor) -> None:
        """Updates the running means with the mean logits `(2,)`, real and fake, of a step that trained the discriminator."""
        if self.lecam is not None:
            self.lecam.update(*mean_logits)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _terms(
        self,
        original: torch.Tensor,
        reconstruction: torch.Tensor,
        posterior: Posterior,
        coefficients: Coefficients | None,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Unweighted values of all terms with a weight."""
        recipe, found = self.recipe, dict[str, torch.Tensor]()
        if recipe.wants("l1"):
            found["l1"] = losses.pixel_l1(original, reconstruction)
        if recipe.wants("mse"):
            found["mse"] = losses.pixel_mse(original, reconstruction)
        if recipe.wants("haar_low", "haar_high"):
            found["haar_low"], found["haar_high"] = losses.haar_l1(original, reconstruction)
        if recipe.wants("frame_sum"):
            found["frame_sum"] = losses.frame_sum(original, reconstruction)
        if recipe.wants("lpips", "lpips_sum", "pyramid"):
            frames = self._perceptual_frames(original, reconstruction, generator)
            if self._lpips is not None and recipe.wants("lpips", "lpips_sum"):
                found["lpips"] = self._lpips(*(part * self._gain + self._offset for part in frames)).mean()
                found["lpips_sum"] = found["lpips"] * original[0, :, 0].numel()
            if recipe.wants("pyramid"):
                found["pyramid"] = pyramid_distance(*frames).mean()
        if recipe.wants("kl"):
            found["kl"] = losses.kl_divergence(posterior)
        if recipe.wants("wl"):
            if coefficients is None:
                raise ValueError("the term wl needs the energy-flow coefficients of both directions")
            found["wl"] = losses.energy_flow(*coefficients)
        return {name: value for name, value in found.items() if recipe.wants(name)}

    def _perceptual_frames(
        self, original: torch.Tensor, reconstruction: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames `N 3 H W` that perceptual terms compare."""
        if self.recipe.perceptual_frames == "all":
            return _frames(original), _frames(reconstruction)
        index = perceptual_frame_indices(original.shape[0], original.shape[2], generator).to(original.device)
        videos = torch.arange(original.shape[0], device=original.device)[:, None]
        picked = [video.transpose(1, 2)[videos, index].flatten(0, 1) for video in (original, reconstruction)]
        return picked[0], picked[1]

    def _discriminator_input(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """The video in the layout the discriminator takes."""
        return _frames(video_BCTHW) if getattr(self.discriminator, "takes", "") == "frames" else video_BCTHW

    def _generator_loss(self, reconstruction: torch.Tensor) -> torch.Tensor:
        if self.recipe.adversarial is None or self.discriminator is None:
            raise RuntimeError("no adversarial term")
        with frozen(self.discriminator):
            logits = self.discriminator(self._discriminator_input(reconstruction))
        match self.recipe.adversarial.generator:
            case "non_saturating":
                return losses.non_saturating_generator(logits)
            case "hinge_sum":
                return losses.hinge_generator_sum(logits, reconstruction.shape[0] * reconstruction.shape[2])
        return losses.hinge_generator(logits)

    def _gan_weight(
        self, reconstruction: Sequence[torch.Tensor], gan: torch.Tensor, last_layer: torch.Tensor | None
    ) -> torch.Tensor:
        if self.recipe.adversarial is None:
            raise RuntimeError("no adversarial term")
        weight = gan.new_tensor(self.recipe.adversarial.weight)
        if not self.recipe.adversarial.adaptive:
            return weight
        if last_layer is None:
            raise ValueError(
                "an adaptive adversarial weight needs last_layer, the parameter where gradients are compared"
            )
        ceiling = self.recipe.adversarial.ceiling
        return weight * losses.adaptive_weight(
            torch.stack(list(reconstruction)).sum(), gan, last_layer, ceiling=ceiling
        )

    def _area_factor(self, video: torch.Tensor) -> float:
        area = self.recipe.reference_area
        return 1.0 if area is None else area / (video.shape[3] * video.shape[4])


def perceptual_frame_indices(videos: int, frames: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of frame 0 and one random group of four per video: `(videos, 5)`, or `(videos, 1)` for images (LeanVAE)."""
    first = torch.zeros((videos, 1), dtype=torch.long)
    if frames <= GROUP:
        return first
    group = torch.randint((frames - 1) // GROUP, (videos, 1), generator=generator, device=generator.device).cpu()
    return torch.cat([first, 1 + GROUP * group + torch.arange(GROUP)], dim=1)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Context in which gradients pass through `network` without accumulating in its parameters."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _frames(video_BCTHW: torch.Tensor) -> torch.Tensor:
    return video_BCTHW.transpose(1, 2).flatten(0, 1)


def _check_alike(original: torch.Tensor, reconstruction: torch.Tensor) -> None:
    if original.shape != reconstruction.shape or original.ndim != 5:
        raise ValueError(
            f"expected an original and a reconstruction of the same shape (B, 3, T, H, W), got {tuple(original.shape)} and "
            f"{tuple(reconstruction.shape)}"
        )
