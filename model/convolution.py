"""Convolutions of frames and of clips with weights packed once for the library that runs them.

Weights are `O I h w` or `O I t h w` (float64 gives the most exact results), inputs are frames `N C H W` in channels-last memory, or clips
`B T H W C` with their past frames. Results have the layout of the input, in at least float32. No state is kept between calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from model.winograd import Winograd

# Least number of input and output channels for Winograd: it is 1.2 times as fast at 128, 1.5 at 256, 2 at 512.
WINOGRAD_WIDTH = 192
BORDERED_WIDTH = 128  # the same for stripes that include the rows above and below, which are in cache already


class FrameConv:
    """2-D convolution with bias, computed in `dtype`; input and output are in at least float32.

    On a CPU the weight is packed once for oneDNN; if this PyTorch build lacks the packed call, `F.conv2d` gives the same values up to
    rounding. `backend` names the one in use. The bits of a result depend on the whole shape of `x`, so callers that promise exact chunking
    must pass the same shape for the same frame size.
    """

    def __init__(
        self,
        weight_OIhw: torch.Tensor,
        bias_O: torch.Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int = 1,
    ) -> None:
        self.dtype, self.full_dtype = dtype, torch.promote_types(dtype, torch.float32)
        pads = (padding, padding) if isinstance(padding, int) else padding
        self.stride, self.padding, self.dilation = [stride, stride], list(pads), [dilation, dilation]
        self.weight = weight_OIhw.detach().to(device, dtype).contiguous(memory_format=torch.channels_last)
        self.bias = None if bias_O is None else bias_O.detach().to(device, dtype).contiguous()
        self.backend = backend(weight_OIhw, device, dtype, stride=stride, padding=pads, dilation=dilation)
        if self.backend == "winograd":
            self.winograd = Winograd(weight_OIhw[:, :, None], bias_O)
            del self.weight
        elif self.backend == "onednn":
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, 1, None
            )

    def __call__(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)` -> `(N, O, H', W')` in fresh channels-last memory."""
        x_NCHW = x_NCHW.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if self.backend == "winograd":
            frames = list(x_NCHW.permute(0, 2, 3, 1))
            return self.winograd(frames, bordered=self.padding == [0, 1]).permute(0, 3, 1, 2)
        if self.backend == "onednn":
            y_NCHW = torch.ops.mkldnn._convolution_pointwise(
                x_NCHW, self.weight, self.bias, self.padding, self.stride, self.dilation, 1, "none", [], ""
            )
        else:
            y_NCHW = F.conv2d(x_NCHW, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return y_NCHW.to(self.full_dtype)


class ClipConv:
    """Causal convolution over frames: sees the past frames its kernel covers, and no future frame.

    Weight `O I t h w`, no padding in time; time and space have the same stride. At the start of a video the first frame is repeated as its
    past, so a single first frame is convolved with the kernel summed over time.

    `usual_frames` is the number of frames most calls bring. It selects the algorithm, so it changes speed and rounding only.
    """

    def __init__(
        self,
        weight_OIthw: torch.Tensor,
        bias_O: torch.Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        stride: int = 1,
        padding: int = 0,
        usual_frames: int = 1,
    ) -> None:
        self.dtype, self.full_dtype = dtype, torch.promote_types(dtype, torch.float32)
        self.taps = weight_OIthw.shape[2]
        self.stride, self.padding, self.dilation = [stride] * 3, [0, padding, padding], [1] * 3
        first_weight = weight_OIthw.detach().double().sum(2)
        self.first_frame_conv = FrameConv(first_weight, bias_O, device, dtype, stride=stride, padding=padding)
        self.weight = weight_OIthw.detach().to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
        self.bias = None if bias_O is None else bias_O.detach().to(device, dtype).contiguous()
        self.backend = backend(weight_OIthw, device, dtype, stride=stride, padding=(padding, padding))
        if self.backend == "winograd":
            self.winograd = Winograd(weight_OIthw, bias_O, paired=self.taps == 3 and usual_frames % 2 == 0)
            del self.weight
        elif self.backend == "onednn":
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, 1, None
            )

    def __call__(self, x_BTHWC: torch.Tensor, past_BTHWC: torch.Tensor | None) -> torch.Tensor:
        """`(B, T, H, W, C)` after `past` frames (None at the start of a video) -> `(B, T', H', W', O)` in fresh memory."""
        x_BTHWC = x_BTHWC.to(self.dtype)
        if past_BTHWC is None and x_BTHWC.shape[1] == 1:
            return from_frames(self.first_frame_conv(x_BTHWC[:, 0].permute(0, 3, 1, 2)), 1)
        if past_BTHWC is None:
            past_BTHWC = x_BTHWC[:, :1].expand(-1, self.taps - 1, -1, -1, -1)
        if self.backend == "winograd":
            videos = [self.winograd([*past, *x]) for past, x in zip(past_BTHWC, x_BTHWC, strict=True)]
            return videos[0].unsqueeze(0) if len(videos) == 1 else torch.stack(videos)
        x_NCTHW = torch.cat([past_BTHWC, x_BTHWC], dim=1).permute(0, 4, 1, 2, 3)
        if self.backend == "onednn":
            y_NCTHW = torch.ops.mkldnn._convolution_pointwise(
                x_NCTHW, self.weight, self.bias, self.padding, self.stride, self.dilation, 1, "none", [], ""
            )
        else:
            y_NCTHW = F.conv3d(x_NCTHW, self.weight, self.bias, self.stride, self.padding)
        return y_NCTHW.to(self.full_dtype).permute(0, 2, 3, 4, 1).contiguous()


def as_frames(x_BTHWC: torch.Tensor) -> torch.Tensor:
    """`(B, T, H, W, C)` -> `(B * T, C, H, W)` in channels-last memory; a view if x is contiguous."""
    return x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)


def from_frames(x_NCHW: torch.Tensor, frames: int) -> torch.Tensor:
    """Inverse of `as_frames`: `(B * T, C, H, W)` in channels-last memory -> `(B, T, H, W, C)`."""
    return x_NCHW.permute(0, 2, 3, 1).unflatten(0, (-1, frames)).contiguous()


def backend(
    weight: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    *,
    stride: int,
    padding: tuple[int, int],
    dilation: int = 1,
) -> str:
    """Implementation to use: `winograd` (3x3 with many channels, float32, CPU), `onednn` (packed weights, CPU) or `torch`."""
    if not can_pack(device, dtype):
        return "torch"
    is_plain = (*weight.shape[-2:], stride, dilation, dtype) == (3, 3, 1, 1, torch.float32)
    least = {(1, 1): WINOGRAD_WIDTH, (0, 1): BORDERED_WIDTH}.get(padding)
    is_wide = least is not None and min(weight.shape[:2]) >= least
    return "winograd" if is_plain and is_wide else "onednn"


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack convolution weights for this device and dtype in this PyTorch build."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    )
