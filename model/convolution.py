"""Convolutions of single frames, prepared once for speed: weights folded by the caller in float64, packed here for the library that runs them.

Enters: a kernel `O I h w` (float64 welcome) and, per call, frames `N C H W` in channels-last memory. Leaves: frames `N C H W` in
channels-last memory, in at least float32. Nothing is kept between calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class FrameConv:
    """A 2-D convolution with bias, the product in `dtype`, what enters and leaves in at least float32.

    On a CPU the weight is packed once for oneDNN; where this build of PyTorch lacks the packed call, `F.conv2d` gives the same values to
    rounding. `backend` says which is in use. The bits of a result depend on the whole shape of `x`, so callers that promise exact
    chunking must always come with the same shape for the same frame size.
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
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        pads = (padding, padding) if isinstance(padding, int) else padding
        self.stride, self.padding, self.dilation = [stride, stride], list(pads), [dilation, dilation]
        self.weight = weight_OIhw.detach().to(device, dtype).contiguous(memory_format=torch.channels_last)
        self.bias = None if bias_O is None else bias_O.detach().to(device, dtype).contiguous()
        self.backend = "onednn" if packs(device, dtype) else "torch"
        if self.backend == "onednn":
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, 1, None
            )

    def __call__(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)` -> `(N, O, H', W')` in fresh channels-last memory."""
        x_NCHW = x_NCHW.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if self.backend == "onednn":
            y_NCHW = torch.ops.mkldnn._convolution_pointwise(
                x_NCHW, self.weight, self.bias, self.padding, self.stride, self.dilation, 1, "none", [], ""
            )
        else:
            y_NCHW = F.conv2d(x_NCHW, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return y_NCHW.to(self.wide)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolution weights can be packed for this device and arithmetic."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    )
