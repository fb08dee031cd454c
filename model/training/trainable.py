"""Trainable LeanVAE: the published network as its formulas define it, channel-last (spec sections 3 to 8).

Takes clips `B 3 T H W` in `spec.value_range`, T = 4n+1 (one frame is an image); returns the reconstruction and its posterior.
`state_dict()` has exactly the published keys, so `model.from_state_dict("leanvae", config, network.state_dict())` is the same
network ready to encode. Initial weights are in `model.training.initialisation`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import inputs
from model.leanvae import haar
from model.leanvae.parameters import Network
from model.leanvae.pixels import FRAMES, patchify
from model.leanvae.vae import LOGVAR_RANGE
from model.posterior import Posterior
from model.registry import complete, spec
from model.training.depthwise import causal_depthwise
from model.training.initialisation import initialise, start_linear
from model.training.latents import sample_latent
from model.training.linear import LinearAutoencoder, assemble, fit_linear
from model.training.reconstruction import Reconstruction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from model.leanvae.parameters import Stack

__all__ = ["LinearAutoencoder", "TrainableLeanVAE", "fit_linear"]

HIDDEN_MULTIPLE = 16


class TrainableLeanVAE(Network):
    """LeanVAE with a forward pass that keeps what the backward pass needs.

    Under `torch.autocast` the products of NAF layers run in 16 bits; pixels, the residual stream, norms and latents stay float32.
    Images give the video patches a gradient of zero, not None, so that every parameter takes part in every pass, which
    data-parallel training needs (if the loss uses the log-variance, by KL or a sampled latent).

    Attributes:
        config: complete configuration. spec: LatentSpec. recompute: layers keep only their input and run again (saves memory).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        seed: int = 0,
        linear: LinearAutoencoder | None = None,
        recompute: bool = False,
    ) -> None:
        """Initialised from `seed`; with `linear` equal to that autoencoder until the first step.

        Raises:
            ValueError: an impossible configuration, or a linear autoencoder that does not fit it.
        """
        full = complete("leanvae", config)
        described = spec("leanvae", full)  # rejects impossible configurations before allocating memory
        super().__init__(full)
        self.config, self.spec, self.recompute = full, described, recompute
        self._side, self._patch = 2 * full["patch_size"][1], full["patch_size"][1]
        initialise(self, seed)
        if linear is not None:
            start_linear(self, linear)

    def forward(self, video_BCTHW: torch.Tensor, noise_BCthw: torch.Tensor | None = None) -> Reconstruction:
        """A clip -> its `Reconstruction` (video not clamped). The latent is mean + deviation * noise, or the mean if noise is None.

        Raises:
            ValueError: wrong rank, dtype, frame count or size; noise of another shape than the latent.
        """
        posterior = self.encode(video_BCTHW)
        return Reconstruction(self.decode(sample_latent(posterior, noise_BCthw)), posterior)

    def encode(self, video_BCTHW: torch.Tensor) -> Posterior:
        """`B 3 T H W` -> mean and clamped log-variance `B d t h w`. Raises ValueError as `forward`."""
        inputs.check_video(video_BCTHW, self.spec, first=True)
        coder, low = self.encoder, self.config["l_dim"]
        image = self._embed(video_BCTHW[:, :, :1], coder.image_low_proj, coder.image_high_proj, 1)
        video = self._embed(video_BCTHW[:, :, 1:], coder.video_low_proj, coder.video_high_proj, FRAMES)
        tokens = torch.cat([image, video], dim=1)
        parts = (
            self._stack(coder.low_layer, tokens[..., :low], residual=True),
            self._stack(coder.high_layer, tokens[..., low:], residual=True),
        )
        features = self._stack(coder.fusion_layer, torch.cat(parts, dim=-1), residual=True)
        mean = exact_linear(features, self.latent_bottleneck.phi)
        logvar = exact_linear(features, self.std_layer.weight, self.std_layer.bias).clamp(*LOGVAR_RANGE)
        return Posterior(mean.permute(0, 4, 1, 2, 3), logvar.permute(0, 4, 1, 2, 3))

    def decode(self, latent_BCthw: torch.Tensor) -> torch.Tensor:
        """`B d t h w` -> `B 3 T H W`, not clamped. Raises ValueError for anything else."""
        inputs.check_latent(latent_BCthw, self.spec)
        coder, low = self.decoder, self.config["l_dim"]
        recovered = self._recover(latent_BCthw.permute(0, 2, 3, 4, 1))
        fused = self._stack(coder.fusion_layer, recovered, residual=True)
        parts = (
            self._stack(coder.low_layer, fused[..., :low], residual=True),
            self._stack(coder.high_layer, fused[..., low:], residual=True),
        )
        tokens = torch.cat(parts, dim=-1)
        image = self._pixels(tokens[:, :1], coder.image_low_proj, coder.image_high_proj, 1)
        video = self._pixels(tokens[:, 1:], coder.video_low_proj, coder.video_high_proj, FRAMES)
        return torch.cat([image, video], dim=2)

    def last_layer(self) -> nn.Parameter:
        """Last weight before the video's pixels, where adaptive weights compare gradients."""
        return cast("nn.Parameter", cast("Any", self.decoder.video_high_proj)[0].weight)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _embed(self, video_BCTHW: torch.Tensor, low: Any, high: Any, depth: int) -> torch.Tensor:
        """Haar transform and patch projections as one product: pixels `B 3 T H W` -> `B t h w C` (spec 3, 4, 11.1)."""
        B, _, T, H, W = video_BCTHW.shape
        kernel = haar.fold_patch(low[1].weight, high[1].weight, _signs(depth), self._patch).to(low[1].weight.dtype)
        rows = patchify(video_BCTHW, depth, self._side) if T else video_BCTHW.new_empty((0, kernel.shape[1]))
        tokens = exact_linear(rows, kernel, torch.cat([low[1].bias, high[1].bias]))
        return tokens.view(B, T // depth, H // self._side, W // self._side, kernel.shape[0])

    def _pixels(self, tokens_BthwC: torch.Tensor, low: Any, high: Any, depth: int) -> torch.Tensor:
        """Un-patch projections and inverse Haar transform as one product: `B t h w C` -> `B 3 T H W` (spec 8, 11.7)."""
        low, high, signs = low[0], high[0], _signs(depth)
        weight = haar.fold_unpatch(low.weight, high.weight, signs, self._patch).to(low.weight.dtype)
        bias = haar.fold_unpatch(low.bias[:, None], high.bias[:, None], signs, self._patch).sum(1).to(low.bias.dtype)
        return assemble(exact_linear(tokens_BthwC, weight, bias), depth, self._side)

    def _recover(self, latent_BthwC: torch.Tensor) -> torch.Tensor:
        """Unrolled iterations: `B t h w d` -> `B t h w C` (spec 7)."""
        bottleneck = self.latent_bottleneck
        recovered = exact_linear(latent_BthwC, bottleneck.Q)
        for step, threshold, analysis, synthesis in zip(
            bottleneck.weights, bottleneck.threshold, bottleneck.forward_l, bottleneck.backward_l, strict=True
        ):
            error = exact_linear(recovered, bottleneck.phi) - latent_BthwC
            moved = recovered - step * exact_linear(error, bottleneck.phi.T)
            features = self._stack(cast("Stack", analysis), moved, residual=False)
            sparse = features.sign() * F.relu(features.abs() - threshold)
            recovered = moved + self._stack(cast("Stack", synthesis), sparse, residual=False)
        return recovered

    def _stack(self, stack: Stack, x_BthwC: torch.Tensor, *, residual: bool) -> torch.Tensor:
        for conv, ffd in zip(stack.dconv_layer, stack.ffd_layer, strict=True):
            layer = (cast("Any", conv)["ds_conv"], cast("nn.Sequential", ffd), residual)
            if self.recompute and torch.is_grad_enabled():
                x_BthwC = cast("torch.Tensor", checkpoint(naf_layer, x_BthwC, *layer, use_reentrant=False))
            else:
                x_BthwC = naf_layer(x_BthwC, *layer)
        return x_BthwC


def naf_layer(x_BthwC: torch.Tensor, ds_conv: nn.Conv3d, ffd: nn.Sequential, residual: bool) -> torch.Tensor:
    """`x + ds(x)`, then `x + ffd(x)`; without the sums if `residual` is false (spec 5)."""
    mixed = causal_depthwise(x_BthwC, ds_conv.weight, cast("torch.Tensor", ds_conv.bias))
    x_BthwC = x_BthwC + mixed if residual else mixed
    value, gate, narrow = _even(cast("nn.Linear", ffd[1]).weight, cast("nn.Linear", ffd[4]).weight)
    normed = ffd[0](x_BthwC)
    branch = F.linear(F.linear(normed, value) * F.gelu(F.linear(normed, gate)), narrow)
    return x_BthwC + branch if residual else branch


def _even(widen: torch.Tensor, narrow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of value, gate and narrowing product, with the hidden width (341, 1365) zero-padded to whole vectors and tiles.

    Zeros stay zero through `a * gelu(g)`. Products of odd widths cost a fifth more on a CPU, and cannot use a GPU's matrix units at all.
    """
    channels, hidden = narrow.shape
    fill = -hidden % HIDDEN_MULTIPLE
    value, gate = F.pad(widen.view(2, hidden, channels), (0, 0, 0, fill)).unbind(0)
    return value, gate, F.pad(narrow, (0, fill))


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Linear map without autocast: 8-bit pixels and latents would lose bits in bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(weight.dtype), weight, bias)


def _signs(depth: int) -> torch.Tensor:
    return haar.image_signs() if depth == 1 else haar.video_signs()
