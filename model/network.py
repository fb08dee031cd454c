"""Base of networks as published: configuration, checks of clips and latents, encode, decode, one pass for training, precision of inference.

A family's `network` module adds the layers and runs them; all arithmetic of the network is there.

Shape suffixes: B batch, C channels, T H W frames and pixels, d latent channels, t h w latents.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

from model import inputs
from model.history import WHOLE, History
from model.layers import set_products
from model.posterior import LOGVAR_RANGE, Posterior
from model.reconstruction import Coefficients, Reconstruction
from model.registry import complete, spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Self

Bands = tuple[torch.Tensor, ...]
Published = dict[str, Any]  # complete configuration in published keys, which `registry.spec` has checked
Config = TypeVar("Config")


def from_published(config: type[Config], published: Published, **derived: Any) -> Config:
    """Dataclass `config` with the values of published keys that have its fields' names; `derived` are its other fields."""
    names = [item.name for item in fields(config) if item.name not in derived]  # type: ignore[arg-type]
    return config(**{name: published[name] for name in names}, **derived)


class Encoded(NamedTuple):
    """What an encoder returns."""

    mean: torch.Tensor  # B d t h w
    logvar: torch.Tensor  # B d t h w, not clamped
    bands: Bands = ()  # wavelet bands that the WL loss compares, of WF-VAE


class Decoded(NamedTuple):
    """What a decoder returns."""

    video: torch.Tensor  # B 3 T H W, not clamped
    bands: Bands = ()  # in the order of `Encoded.bands`


class PublishedNetwork(nn.Module):
    """Video VAE as published. Parameters are arbitrary until weights are loaded or training draws them.

    A family defines `family`, `last_weight`, `add_layers`, `run_encoder` and `run_decoder`.

    Attributes:
        config: complete published configuration. spec: LatentSpec. recompute: as given; may be set later.
    """

    family: str
    last_weight: str  # name of the last weight before the video's pixels; its dtype is that of inputs
    logvar_range: tuple[float, float] | None = LOGVAR_RANGE  # that the log-variance is clamped to, None: it is not

    def __init__(self, config: Mapping[str, Any], *, recompute: bool = False) -> None:
        """With `recompute` blocks keep only their input and run again in the backward pass (saves memory).

        Raises:
            ValueError: an impossible configuration.
        """
        super().__init__()
        self.config = complete(self.family, config)
        self.spec = spec(self.family, self.config)
        self.add_layers()
        self.recompute = recompute

    @property
    def recompute(self) -> bool:
        """Whether blocks keep only their input and run again in the backward pass."""
        return self._recompute

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self._recompute = on
        blocks: Iterable[Any] = (module for module in self.modules() if module is not self)
        for block in blocks:
            block.recompute = on  # read by `model.layers.run`

    @classmethod
    def empty(cls, config: Mapping[str, Any], *, recompute: bool = False) -> Self:
        """Network on the meta device: names and shapes without memory. Arguments and errors: as of the constructor."""
        with torch.device("meta"):
            return cls(config, recompute=recompute)

    def encode(self, video_BCTHW: torch.Tensor, history: History = WHOLE) -> Posterior:
        """`B 3 T H W` -> mean, and log-variance clamped to `logvar_range`, `B d t h w`. Raises ValueError for a video that does not fit."""
        return self._encode(video_BCTHW, history)[0]

    def decode(self, latent_BCthw: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B d t h w` (neither scaled nor shifted) -> `B 3 T H W`, not clamped; steps before the last may hold frames back.

        Raises:
            ValueError: a latent that does not fit.
        """
        return self._decode(latent_BCthw, history).video

    def forward(self, video_BCTHW: torch.Tensor, noise_BCthw: torch.Tensor | None = None) -> Reconstruction:
        """A video -> its reconstruction, not clamped. The latent is mean + deviation * noise, or the mean without noise.

        With noise every parameter gets a gradient (zero if unused), also for one frame: data-parallel training needs it. Without noise and
        without a loss of the log-variance, parameters that only the log-variance depends on get none (LeanVAE's `std_layer`).

        Raises:
            ValueError: a video that does not fit; noise of another shape than the latent.
        """
        posterior, encoded = self._encode(video_BCTHW, WHOLE)
        video, decoded = self._decode(posterior.with_noise(noise_BCthw), WHOLE)
        return Reconstruction(video, posterior, Coefficients(encoded, decoded) if encoded else None)

    def prepare(self, dtype: torch.dtype) -> None:
        """Casts the weights in place for inference with large products in `dtype`."""
        set_products(self, dtype)

    def last_layer(self) -> nn.Parameter:
        """Last weight before the video's pixels, where adaptive weights compare gradients."""
        return self.get_parameter(self.last_weight)

    # ---- of a family ------------------------------------------------------------------------------------------------

    def add_layers(self) -> None:
        """Adds the layers of `config`, under their published names."""
        raise NotImplementedError

    def run_encoder(self, video_BCTHW: torch.Tensor, history: History) -> Encoded:
        """`B 3 T H W` -> mean and log-variance `B d t h w`, and bands."""
        raise NotImplementedError

    def run_decoder(self, latent_BCthw: torch.Tensor, history: History) -> Decoded:
        """`B d t h w` -> `B 3 T H W`, and bands."""
        raise NotImplementedError

    # ---- checks and casts -------------------------------------------------------------------------------------------

    def _encode(self, video_BCTHW: torch.Tensor, history: History) -> tuple[Posterior, Bands]:
        inputs.check_video(video_BCTHW, self.spec, first=history.first)
        mean, logvar, bands = self.run_encoder(video_BCTHW.to(self.last_layer().dtype), history)
        return Posterior(mean, logvar if self.logvar_range is None else logvar.clamp(*self.logvar_range)), bands

    def _decode(self, latent_BCthw: torch.Tensor, history: History) -> Decoded:
        inputs.check_latent(latent_BCthw, self.spec)
        return self.run_decoder(latent_BCthw.to(self.last_layer().dtype), history)
