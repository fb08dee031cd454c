"""LeanVAE's encoder and decoder, prepared for speed: linear maps that follow each other are folded into one.

Takes pixels or latents with each layer's past rows; returns the outputs of the posterior heads, or a video, and the new past rows.
Checks of inputs and splitting into steps are in `model.leanvae.vae`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from model.leanvae import haar
from model.leanvae.depthwise import HISTORY_ROWS
from model.leanvae.fast.folding import fold_patch, fold_unpatch
from model.leanvae.fast.fused import FusedLayer
from model.leanvae.fast.pixels import FRAMES, first_frame, groups, unpatchify
from model.leanvae.fast.tokens import (
    BLOCK,
    LayerHistory,
    NAFLayer,
    Projection,
    RowHistory,
    blocks,
    by_rows,
    full_dtype,
    run_row,
    run_stack,
    spans,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from model.kernels import Kernels
    from model.leanvae.fast.pixels import Pixels
    from model.leanvae.fast.tokens import HiddenBlock
    from model.leanvae.network import Network, Stack


class PreparedCoder:
    """Base of encoder and decoder: device, dtypes, and the numbering of layers that have state.

    With `kernels` the layers are `FusedLayer`s (`model.leanvae.fast.fused`), otherwise `NAFLayer`s.
    """

    def __init__(
        self,
        network: Network,
        config: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels | None = None,
    ) -> None:
        self.device, self.dtype, self.full_dtype, self.kernels = device, dtype, full_dtype(dtype), kernels
        self.low, self.width = config["l_dim"], config["embedding_dim"]
        self.patch = config["patch_size"][1]
        self.side = 2 * self.patch  # of a token, in pixels
        self.slots = 0

    def layers(self, stack: Stack, *, residual: bool) -> list[NAFLayer]:
        """Layers of a stack; each gets the next free slot of the state."""
        prepared: list[NAFLayer] = []
        for conv, ffd in zip(stack.dconv_layer, stack.ffd_layer, strict=True):
            ds_conv = cast("nn.Conv3d", cast("nn.ModuleDict", conv)["ds_conv"])
            layer: tuple[Any, ...] = (
                ds_conv,
                cast("nn.Sequential", ffd),
                self.slots,
                residual,
                self.device,
                self.dtype,
            )
            prepared.append(NAFLayer(*layer) if self.kernels is None else FusedLayer(*layer, self.kernels))
            self.slots += 1
        return prepared

    def project(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, full_precision: bool = False
    ) -> Projection:
        """Projection computed in the network's dtype, or with `full_precision` in at least float32."""
        return Projection(weight, bias, self.device, self.full_dtype if full_precision else self.dtype)


class Encoder(PreparedCoder):
    """Encoder with folded weights: pixels -> outputs of the posterior heads."""

    def __init__(self, network: Network, *arguments: Any) -> None:
        super().__init__(network, *arguments)
        coder = network.encoder
        self.video_patch = self._patch(coder.video_low_proj, coder.video_high_proj, haar.video_signs())
        self.image_patch = self._patch(coder.image_low_proj, coder.image_high_proj, haar.image_signs())
        self.low_layers = self.layers(coder.low_layer, residual=True)
        self.high_layers = self.layers(coder.high_layer, residual=True)
        self.fusion_layers = self.layers(coder.fusion_layer, residual=True)
        # the last narrowing product and the heads are both linear: head(y + narrow(h)) = head y + (head narrow) h
        narrow = self.fusion_layers[-1].narrow_weight()
        phi, std = network.latent_bottleneck.phi.double(), network.std_layer
        self.mean_heads = self.project(phi, full_precision=True), self.project(phi @ narrow)
        self.logvar_heads = (
            self.project(std.weight, std.bias, full_precision=True),
            self.project(std.weight.double() @ narrow),
        )

    def _patch(self, low: Any, high: Any, signs: torch.Tensor) -> Projection:
        kernel = fold_patch(low[1].weight, high[1].weight, signs, self.patch)
        return Projection(kernel, torch.cat([low[1].bias, high[1].bias]), self.device, self.pixel_dtype)

    @property
    def pixel_dtype(self) -> torch.dtype:
        """Dtype of pixels and of the product that reads them.

        bfloat16 would lose the last bit of 8-bit pixels. The fused path uses float16, which has three more bits and runs at the
        full rate of a GPU's matrix units; otherwise this product runs in at least float32.
        """
        return torch.float16 if self.kernels is not None and self.full_dtype != self.dtype else self.full_dtype

    def __call__(
        self, pixels: Pixels, past: Sequence[torch.Tensor] | None, heads: Sequence[tuple[Projection, Projection]]
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """One output `B t h w d` per pair of heads (one for tokens, one for the hidden layer), and the new state's tensors."""
        rows, (height, width) = -(-pixels.frames // FRAMES), pixels.size
        shape = (pixels.batch, rows, height // self.side, width // self.side)
        outputs = [
            torch.empty((*shape, of_token.width), dtype=self.full_dtype, device=self.device) for of_token, _ in heads
        ]
        run = self._run_rows if by_rows(self.device) else self._run_grid
        return outputs, run(pixels, past, heads, outputs)

    def _run_rows(
        self,
        pixels: Pixels,
        past: Sequence[torch.Tensor] | None,
        heads: Sequence[tuple[Projection, Projection]],
        outputs: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Runs all layers on one row of one video at a time, so that intermediate values are few and stay in cache."""
        B, rows, h, w = outputs[0].shape[:4]
        histories = [RowHistory(past, self.slots, video) for video in range(B)]
        for video, history in enumerate(histories):
            for row in range(rows):
                embedded = self._embed(pixels, slice(video, video + 1), slice(row, row + 1), past is None)
                x = embedded.view(h, w, self.width)
                low = run_row(self.low_layers, x[..., : self.low].contiguous(), history)
                high = run_row(self.high_layers, x[..., self.low :].contiguous(), history)
                x = run_row(self.fusion_layers[:-1], torch.cat([low, high], dim=-1), history)
                last = self.fusion_layers[-1]
                self._read(
                    last.row_hidden_blocks(history.window(last.slot, x)), heads, [out[video, row] for out in outputs]
                )
        if B == 1:
            return tuple(
                histories[0].last(slot).unsqueeze(0) for slot in range(self.slots)
            )  # `last` returns fresh memory
        return tuple(torch.stack([history.last(slot) for history in histories]) for slot in range(self.slots))

    def _run_grid(
        self,
        pixels: Pixels,
        past: Sequence[torch.Tensor] | None,
        heads: Sequence[tuple[Projection, Projection]],
        outputs: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Runs one layer after another on all rows of all videos."""
        B, rows, h, w = outputs[0].shape[:4]
        history, like = LayerHistory(past, self.slots), outputs[0]
        low = history.padded_input(self.low_layers[0].slot, B, rows, (h, w), self.low, like)
        high = history.padded_input(self.high_layers[0].slot, B, rows, (h, w), self.width - self.low, like)
        for start, stop, _ in groups(slice(0, rows), past is None):
            embedded = self._embed(pixels, slice(0, B), slice(start, stop), past is None)
            embedded = embedded.view(B, stop - start, h, w, self.width)
            low[:, HISTORY_ROWS + start : HISTORY_ROWS + stop].copy_(embedded[..., : self.low])
            high[:, HISTORY_ROWS + start : HISTORY_ROWS + stop].copy_(embedded[..., self.low :])
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
        self._read(last.hidden_blocks(x), heads, outputs)
        return history.new_state()

    def _embed(self, pixels: Pixels, videos: slice, span: slice, image: bool) -> torch.Tensor:
        """Tokens `(n, C)` of a span of rows that all cover the same number of frames."""
        ((_, _, depth),) = groups(span, image)
        frames = slice(first_frame(span.start, image), first_frame(span.stop, image))
        tokens = pixels.rows(videos, frames, depth, self.side)
        projection = self.image_patch if depth == 1 else self.video_patch
        if not by_rows(self.device) or tokens.shape[0] <= BLOCK:
            return projection(tokens)
        return torch.cat([projection(tokens[block]) for block in blocks(tokens.shape[0])])

    def _read(
        self,
        steps: Iterable[HiddenBlock],
        heads: Sequence[tuple[Projection, Projection]],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """Applies the heads to the last layer's tokens and hidden layer, into `outputs`."""
        for block, y_NC, hidden in steps:
            for out, (of_token, of_hidden) in zip(outputs, heads, strict=True):
                out.view(-1, of_token.width)[block] = of_token(y_NC).add_(of_hidden(hidden))


class Decoder(PreparedCoder):
    """Decoder with folded weights: latents -> pixels."""

    def __init__(self, network: Network, *arguments: Any) -> None:
        super().__init__(network, *arguments)
        bottleneck, coder = network.latent_bottleneck, network.decoder
        phi = bottleneck.phi
        self.initial = self.project(bottleneck.Q, full_precision=True)
        self.sense, self.lift = self.project(phi, full_precision=True), self.project(phi.T, full_precision=True)
        self.step_sizes = [float(weight) for weight in bottleneck.weights]
        self.thresholds = [float(threshold) for threshold in bottleneck.threshold]
        self.analysis = [self.layers(stack, residual=False) for stack in bottleneck.forward_l]  # type: ignore[arg-type]
        self.synthesis = [self.layers(stack, residual=False) for stack in bottleneck.backward_l]  # type: ignore[arg-type]
        self.fusion_layers = self.layers(coder.fusion_layer, residual=True)
        self.low_layers = self.layers(coder.low_layer, residual=True)
        self.high_layers = self.layers(coder.high_layer, residual=True)
        self.video_unpatch = self._unpatch(coder.video_low_proj, coder.video_high_proj, haar.video_signs())
        self.image_unpatch = self._unpatch(coder.image_low_proj, coder.image_high_proj, haar.image_signs())

    def _unpatch(self, low: Any, high: Any, signs: torch.Tensor) -> Projection:
        weight = fold_unpatch(low[0].weight, high[0].weight, signs, self.patch)
        bias = fold_unpatch(low[0].bias[:, None], high[0].bias[:, None], signs, self.patch).sum(1)
        return self.project(weight, bias, full_precision=True)

    def __call__(
        self, latent_BtHWC: torch.Tensor, past: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Video `B 3 T H W` and the new state's tensors; the first row is an image if `past` is None."""
        B, rows, h, w, _ = latent_BtHWC.shape
        history = LayerHistory(past, self.slots)
        recovered = self.recover(latent_BtHWC, history)
        like = recovered

        padded = history.padded_input(self.fusion_layers[0].slot, B, rows, (h, w), self.width, like)
        padded[:, HISTORY_ROWS:].copy_(recovered)
        run_stack(self.fusion_layers, padded, history, recovered)
        tokens = torch.empty_like(recovered)
        for layers, part in ((self.low_layers, slice(0, self.low)), (self.high_layers, slice(self.low, self.width))):
            padded = history.padded_input(layers[0].slot, B, rows, (h, w), part.stop - part.start, like)
            padded[:, HISTORY_ROWS:].copy_(recovered[..., part])
            run_stack(layers, padded, history, tokens[..., part])
        del padded, recovered
        return self._pixels(tokens, image=past is None), history.new_state()

    def recover(self, latent_BtHWC: torch.Tensor, history: LayerHistory) -> torch.Tensor:
        """Runs the unrolled iterations: latents `B t h w d` -> features `B t h w C`."""
        B, rows, h, w, d = latent_BtHWC.shape
        recovered = latent_BtHWC.new_empty((B, rows, h, w, self.width))
        parts = list(spans(B, rows, self.device))
        for part in parts:
            recovered[part].copy_(self.initial(latent_BtHWC[part].reshape(-1, d)).view_as(recovered[part]))
        for step, threshold, analysis, synthesis in zip(
            self.step_sizes, self.thresholds, self.analysis, self.synthesis, strict=True
        ):
            for part in parts:
                r, y = recovered[part].reshape(-1, self.width), latent_BtHWC[part].reshape(-1, d)
                gradient = self.lift(self.sense(r).sub_(y))
                recovered[part].sub_(gradient.view_as(recovered[part]), alpha=step)
            padded = history.padded_input(analysis[0].slot, B, rows, (h, w), self.width, recovered)
            padded[:, HISTORY_ROWS:].copy_(recovered)
            sparse = history.padded_input(synthesis[0].slot, B, rows, (h, w), self.width, recovered)
            run_stack(analysis, padded, history, sparse[:, HISTORY_ROWS:])
            sparse[:, HISTORY_ROWS:].copy_(soft_threshold(sparse[:, HISTORY_ROWS:], threshold))
            correction = torch.empty_like(recovered)
            run_stack(synthesis, sparse, history, correction)
            recovered += correction
        return recovered

    def _pixels(self, tokens: torch.Tensor, *, image: bool) -> torch.Tensor:
        B, rows, h, w, _ = tokens.shape
        frames = FRAMES * rows - (FRAMES - 1) * image
        video = tokens.new_empty((B, 3, frames, self.side * h, self.side * w))
        for videos, span in spans(B, rows, self.device):
            for start, stop, depth in groups(span, image):
                projection = self.image_unpatch if depth == 1 else self.video_unpatch
                flat = tokens[videos, start:stop].reshape(-1, self.width)
                whole = [slice(0, flat.shape[0])] if not by_rows(self.device) else blocks(flat.shape[0])
                pixels = torch.cat([projection(flat[block]) for block in whole])
                target = video[videos, :, first_frame(start, image) : first_frame(stop, image)]
                unpatchify(pixels, depth, self.side, target)
        return video


def soft_threshold(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """`sign(x) * max(|x| - threshold, 0)`."""
    return x.sign() * (x.abs() - threshold).clamp_(min=0)
