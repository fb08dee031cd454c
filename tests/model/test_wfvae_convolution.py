"""Prepared convolutions compared with PyTorch in float64: every backend, odd sizes, strides, the start of a video."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.convolution import ClipConv, FrameConv
from model.winograd import Winograd

CPU = torch.device("cpu")
BOUND = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) * scale


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert (got - want).abs().max() <= BOUND[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("inside", "outside", "kernel", "stride", "padding", "backend"),
    [
        (8, 12, 3, 1, 1, "onednn"),
        (8, 8, 3, 2, 0, "onednn"),
        (16, 24, 1, 1, 0, "onednn"),
        (192, 200, 3, 1, 1, "winograd"),
    ],
)
def test_frame_convolutions_equal_pytorch(dtype, inside, outside, kernel, stride, padding, backend):
    weight, bias = draw(outside, inside, kernel, kernel, scale=0.1), draw(outside)
    conv = FrameConv(weight, bias, CPU, dtype, stride=stride, padding=padding)
    x = draw(2, inside, 11, 14).to(dtype).float()
    want = F.conv2d(x.double(), weight, bias, stride, padding)
    got = conv(x.to(torch.promote_types(dtype, torch.float32)).contiguous(memory_format=torch.channels_last))
    close(got, want, dtype)
    assert got.is_contiguous(memory_format=torch.channels_last)
    packed = dtype in (torch.float32, torch.bfloat16)
    assert conv.backend == (("onednn" if dtype == torch.bfloat16 else backend) if packed else "torch")


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("channels", "stride"), [(12, 1), (12, 2), (192, 1)])
def test_clip_convolutions_equal_pytorch_with_and_without_past(dtype, channels, stride):
    weight, bias, padding = draw(channels, channels, 3, 3, 3, scale=0.05), draw(channels), 2 - stride
    conv = ClipConv(weight, bias, CPU, dtype, stride=stride, padding=padding, usual_frames=2)
    frames = draw(1, 7, 9, 7, channels).to(dtype)

    def want(clip_BTHWC: torch.Tensor) -> torch.Tensor:
        x = clip_BTHWC.double().permute(0, 4, 1, 2, 3)
        return F.conv3d(x, weight, bias, stride, (0, padding, padding)).permute(0, 2, 3, 4, 1)

    past = 3 - stride
    close(conv(frames[:, past:5], frames[:, :past]), want(frames[:, :5]), dtype)
    first = frames[:, :1]
    close(conv(first, None), want(torch.cat([first, first, first], dim=1)), dtype)
    close(conv(frames[:, :5], None), want(torch.cat([first, first, frames[:, :5]], dim=1)), dtype)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 6), (40, 33)])
@pytest.mark.parametrize(("taps", "paired"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_winograd_is_right_at_every_edge(monkeypatch, taps, paired, frames, height, width):
    """Strips of a few rows, the last one shorter; frames with odd sides; pairs of frames and a single last one."""
    monkeypatch.setattr("model.winograd.STRIP_VALUES", 1)
    monkeypatch.setattr("model.winograd.LEAST_TILES", 51)
    weight, bias = draw(5, 6, taps, 3, 3), draw(5)
    x = draw(frames + taps - 1, height, width, 6).float()
    got = Winograd(weight, bias, paired=paired)(list(x))
    want = F.conv3d(x.double().permute(3, 0, 1, 2)[None], weight, bias, padding=(0, 1, 1))
    close(got, want[0].permute(1, 2, 3, 0), torch.float32)
    assert got.is_contiguous()
    without_bias = Winograd(weight, None, paired=paired)(list(x))
    assert torch.allclose(without_bias + bias.float(), got, atol=1e-4)


def test_pairs_of_frames_are_transformed_in_time():
    weight = draw(192, 192, 3, 3, 3)
    paired = [
        ClipConv(weight, None, CPU, torch.float32, padding=1, usual_frames=n).winograd.paired for n in (1, 2, 3, 4)
    ]
    assert paired == [False, True, False, True]
