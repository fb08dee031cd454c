"""LeanVAE's encoder and decoder on fused layers: linear maps that follow each other are folded into one.

Takes pixels or latents with each layer's past rows; returns the outputs of the posterior heads, or a video, and the new past rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from model.leanvae import haar
from model.leanvae.depthwise import HISTORY_ROWS
from model.leanvae.facts import FRAMES
from model.leanvae.fast.folding import fold_patch, fold_unpatch
from model.leanvae.fast.layers import FusedLayer, LayerHistory, Projection, run_stack
from model.leanvae.network import bands_of, soft_threshold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from model.history import StateTensors
    from model.kernels import Kernels
    from model.leanvae.fast.pixels import StepPixels
    from model.leanvae.network import Network


class FusedCoder:
    """Base of encoder and decoder: device, dtypes, and the numbering of layers that have state."""

    def __init__(self, network: Network, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        self.device, self.dtype, self.kernels = device, dtype, kernels
        self.full_dtype = torch.promote_types(dtype, torch.float32)
        self.low, self.width = network.config["l_dim"], network.config["embedding_dim"]
        self.patch = network.config["patch_size"][1]
        self.side = 2 * self.patch  # of a token, in pixels
        self.slots = 0

    def layers(self, stack: Any) -> list[FusedLayer]:
        """Layers of a `Stack`; each gets the next free slot of the state."""
        prepared = []
        for conv, ffd in zip(stack.dconv_layer, stack.ffd_layer, strict=True):
            layer = conv["ds_conv"], ffd, self.slots, stack.residual
            prepared.append(FusedLayer(*layer, self.device, self.dtype, self.kernels))
            self.slots += 1
        return prepared

    def project(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Projection:
        """Projection computed in `dtype` [default: at least float32]."""
        return Projection(weight, bias, self.device, dtype or self.full_dtype)


class Encoder(FusedCoder):
    """Encoder with folded weights: pixels -> outputs of the posterior heads.

    Attributes:
        pixel_dtype: of pixels and of the product that reads them. bfloat16 would lose the last bit of 8-bit pixels; float16 has three more
            bits and runs at the full rate of a GPU's matrix units.
    """

    def __init__(self, network: Network, *arguments: Any) -> None:
        super().__init__(network, *arguments)
        self.pixel_dtype = torch.float16 if self.full_dtype != self.dtype else self.full_dtype
        coder = network.encoder
        self.video_patch = self._patch(coder.video_low_proj, coder.video_high_proj, haar.video_signs())
        self.image_patch = self._patch(coder.image_low_proj, coder.image_high_proj, haar.image_signs())
        self.low_layers, self.high_layers = self.layers(coder.low_layer), self.layers(coder.high_layer)
        self.fusion_layers = self.layers(coder.fusion_layer)
        # the last narrowing product and the heads are both linear: head(y + narrow(h)) = head y + (head narrow) h
        narrow = self.fusion_layers[-1].narrow_weight
        phi, std = network.latent_bottleneck.phi.double(), network.std_layer
        self.heads = (
            (self.project(phi), self.project(phi @ narrow, dtype=self.dtype)),
            (self.project(std.weight, std.bias), self.project(std.weight.double() @ narrow, dtype=self.dtype)),
        )

    def _patch(self, low: Any, high: Any, signs: torch.Tensor) -> Projection:
        kernel = fold_patch(low[1].weight, high[1].weight, signs, self.patch)
        return self.project(kernel, torch.cat([low[1].bias, high[1].bias]), self.pixel_dtype)

    def __call__(
        self, pixels: StepPixels, past: Sequence[torch.Tensor] | None, heads: int
    ) -> tuple[list[torch.Tensor], StateTensors]:
        """Outputs `B t h w d` of that many heads (mean, log-variance), and the new state's tensors."""
        B, frames, height, width = pixels.shape
        rows, h, w = -(-frames // FRAMES), height // self.side, width // self.side
        outputs = [
            torch.empty((B, rows, h, w, of_token.width), dtype=self.full_dtype, device=self.device)
            for of_token, _ in self.heads[:heads]
        ]
        history, like = LayerHistory(past, self.slots), outputs[0]
        low = history.padded_input(self.low_layers[0].slot, B, rows, (h, w), self.low, like)
        high = history.padded_input(self.high_layers[0].slot, B, rows, (h, w), self.width - self.low, like)
        for of, shown, depth in groups(rows, past is None):
            patch = self.image_patch if depth == 1 else self.video_patch
            embedded = patch(pixels.rows(shown, depth, self.side)).view(B, -1, h, w, self.width)
            low[:, HISTORY_ROWS:][:, of].copy_(embedded[..., : self.low])
            high[:, HISTORY_ROWS:][:, of].copy_(embedded[..., self.low :])
        x = history.padded_input(self.fusion_layers[0].slot, B, rows, (h, w), self.width, like)
        run_stack(self.low_layers, low, history, x[:, HISTORY_ROWS:, ..., : self.low])
        del low
        run_stack(self.high_layers, high, history, x[:, HISTORY_ROWS:, ..., self.low :])
        del high
        last = self.fusion_layers[-1]
        if len(self.fusion_layers) > 1:
            following = history.padded_input(last.slot, B, rows, (h, w), self.width, like)
            run_stack(self.fusion_layers[:-1], x, history, following[:, HISTORY_ROWS:])
            x = following
        history.save(last.slot, x)
        for block, y_NC, hidden in last.hidden_blocks(x):
            for out, (of_token, of_hidden) in zip(outputs, self.heads, strict=False):
                out.view(-1, of_token.width)[block] = of_token(y_NC).add_(of_hidden(hidden))
        return outputs, history.new_state()


class Decoder(FusedCoder):
    """Decoder with folded weights: latents -> pixels."""

    def __init__(self, network: Network, *arguments: Any) -> None:
        super().__init__(network, *arguments)
        bottleneck, coder = network.latent_bottleneck, network.decoder
        phi = bottleneck.phi
        self.initial, self.sense, self.lift = (self.project(weight) for weight in (bottleneck.Q, phi, phi.T))
        self.iterations = [
            (float(step), float(threshold), self.layers(analysis), self.layers(synthesis))
            for step, threshold, analysis, synthesis in zip(
                bottleneck.weights, bottleneck.threshold, bottleneck.forward_l, bottleneck.backward_l, strict=True
            )
        ]
        self.fusion_layers = self.layers(coder.fusion_layer)
        self.low_layers, self.high_layers = self.layers(coder.low_layer), self.layers(coder.high_layer)
        self.video_unpatch = self._unpatch(coder.video_low_proj, coder.video_high_proj, haar.video_signs())
        self.image_unpatch = self._unpatch(coder.image_low_proj, coder.image_high_proj, haar.image_signs())

    def _unpatch(self, low: Any, high: Any, signs: torch.Tensor) -> Projection:
        weight = fold_unpatch(low[0].weight, high[0].weight, signs, self.patch)
        bias = fold_unpatch(low[0].bias[:, None], high[0].bias[:, None], signs, self.patch).sum(1)
        return self.project(weight, bias)

    def __call__(
        self, latent_Bthwd: torch.Tensor, past: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, StateTensors]:
        """Video `B 3 T H W` and the new state's tensors; the first row is an image if `past` is None."""
        B, rows, h, w, _ = latent_Bthwd.shape
        history = LayerHistory(past, self.slots)
        recovered = self._recover(latent_Bthwd, history)
        padded = history.padded_input(self.fusion_layers[0].slot, B, rows, (h, w), self.width, recovered)
        padded[:, HISTORY_ROWS:].copy_(recovered)
        run_stack(self.fusion_layers, padded, history, recovered)
        tokens = torch.empty_like(recovered)
        for layers, part in ((self.low_layers, slice(0, self.low)), (self.high_layers, slice(self.low, self.width))):
            padded = history.padded_input(layers[0].slot, B, rows, (h, w), part.stop - part.start, recovered)
            padded[:, HISTORY_ROWS:].copy_(recovered[..., part])
            run_stack(layers, padded, history, tokens[..., part])
        del padded, recovered
        return self._pixels(tokens, image=past is None), history.new_state()

    def _recover(self, latent_Bthwd: torch.Tensor, history: LayerHistory) -> torch.Tensor:
        """Runs the unrolled iterations: latents `B t h w d` -> features `B t h w C`."""
        B, rows, h, w, _ = latent_Bthwd.shape
        recovered = self.initial(latent_Bthwd)
        for step, threshold, analysis, synthesis in self.iterations:
            recovered.sub_(self.lift(self.sense(recovered).sub_(latent_Bthwd)), alpha=step)
            padded = history.padded_input(analysis[0].slot, B, rows, (h, w), self.width, recovered)
            padded[:, HISTORY_ROWS:].copy_(recovered)
            sparse = history.padded_input(synthesis[0].slot, B, rows, (h, w), self.width, recovered)
            run_stack(analysis, padded, history, sparse[:, HISTORY_ROWS:])
            sparse[:, HISTORY_ROWS:].copy_(soft_threshold(sparse[:, HISTORY_ROWS:], threshold))
            correction = torch.empty_like(recovered)
            run_stack(synthesis, sparse, history, correction)
            recovered += correction
        return recovered

    def _pixels(self, tokens_BthwC: torch.Tensor, *, image: bool) -> torch.Tensor:
        parts = []
        for of, _, depth in groups(tokens_BthwC.shape[1], image):
            projection = self.image_unpatch if depth == 1 else self.video_unpatch
            parts.append(bands_of(projection(tokens_BthwC[:, of]), depth, self.side))
        return torch.cat(parts, dim=2)


def groups(rows: int, image: bool) -> Iterator[tuple[slice, slice, int]]:
    """Rows of a step that cover equally many frames: which rows, their frames, frames a row. With `image` row 0 is one frame."""
    if image:
        yield slice(0, 1), slice(0, 1), 1
    if rows > image:
        yield slice(int(image), rows), slice(int(image), None), FRAMES
