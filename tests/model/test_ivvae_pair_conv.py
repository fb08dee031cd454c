"""Pairs of convolutions compared with their definition, computed in both ways; other layers compared with PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.convolution import FrameConv
from model.ivvae.fast.pair_conv import PairConv
from model.ivvae.fast.resample import Downsample, Upsample
from model.ivvae.fast.stream_state import StreamState, stripes
from model.ivvae.layers import ConvPair, Resample

pytestmark = pytest.mark.filterwarnings("error")
CPU = torch.device("cpu")
BOUND = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) * scale


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Float64 weights, for an exact reference."""
    drawn = {key: draw(*value.shape, scale=value[0].numel() ** -0.5) for key, value in module.state_dict().items()}
    module.double().load_state_dict(drawn)
    return module.requires_grad_(False)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert (got - want).abs().max() <= BOUND[dtype] * want.abs().max()


def by_definition(pair: ConvPair, window_TBHWC: torch.Tensor, group: int) -> torch.Tensor:
    """Spec section 2: zero after every group; the previous frame is that of the group before."""
    outputs = []
    for start in range(1, window_TBHWC.shape[0], group):
        x = window_TBHWC[start - 1 : start + group]
        x = F.pad(torch.cat([x, torch.zeros_like(x[:1])]).permute(1, 4, 0, 2, 3), (1, 1))
        y_2d = F.conv3d(x[:, :, 1:-1], pair.conv_2d.weight[:, :, None], pair.conv_2d.bias)
        y_3d = F.conv3d(x, pair.conv_3d.weight, pair.conv_3d.bias)
        outputs.append(torch.cat([y_2d, y_3d], dim=1).permute(2, 0, 3, 4, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("width", "group", "groups", "batch"), [(3, 4, 1, 1), (3, 4, 3, 2), (3, 2, 2, 1), (64, 2, 1, 1)]
)
def test_groups_follow_the_definition(monkeypatch, width, group, groups, batch, dtype, shifted):
    if shifted:
        monkeypatch.setattr("model.ivvae.fast.pair_conv.filters_minimally", lambda device, dtype: False)
    pair = fill(ConvPair(2 * width, width, 3))
    window = draw(1 + group * groups, batch, 9, 10, 2 * width).to(dtype)
    want = by_definition(pair, window.double(), group)
    close(PairConv(pair, group, CPU, dtype)(window), want, dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("width", [3, 64])
def test_the_first_frame_is_its_own_past_and_has_no_next_frame(width, dtype):
    pair = fill(ConvPair(2 * width, width, 3))
    frame = draw(2, 8, 10, 2 * width).to(dtype)
    x = frame.double()
    want = by_definition(pair, torch.stack([x, x]), 1)
    close(PairConv(pair, 4, CPU, dtype).first_frame(frame), want, dtype)


@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (4, 5), (11, 30)])
@pytest.mark.parametrize("channels", [8, 128])
def test_bordered_frames_need_no_padding(monkeypatch, channels, rows, columns):
    """Strips of a few rows within a stripe; many channels use Winograd's transform."""
    monkeypatch.setattr("model.winograd.STRIP_VALUES", 1)
    monkeypatch.setattr("model.winograd.LEAST_TILES", 40)
    weight, bias, x = draw(channels, channels, 3, 3, scale=0.05), draw(channels), draw(2, channels, rows, columns)
    conv = FrameConv(weight, bias, CPU, torch.float32, padding=(0, 1))
    assert conv.backend == ("winograd" if channels == 128 else "onednn")
    close(conv(x.float()), F.conv2d(x, weight, bias, padding=(0, 1)), torch.float32)


def state_of(lead: bool, dtype: torch.dtype) -> StreamState:
    return StreamState(None if lead else (), 0, {}, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lead", [True, False])
def test_downsampling_equals_pytorch(monkeypatch, lead, dtype):
    monkeypatch.setattr("model.ivvae.fast.stream_state.STRIPE_PIXELS", 10)
    monkeypatch.setattr("model.ivvae.fast.stream_state.STRIPE_ROWS", 2)
    block = fill(Resample(4, 4, torch.nn.Conv3d(4, 4, (2, 1, 1))))
    x = draw(1 if lead else 4, 2, 12, 10, 8)
    padded = F.pad(x.permute(1, 4, 0, 2, 3), (0, 1, 0, 1))
    flat, motion = (
        F.conv3d(half, conv[1].weight[:, :, None], conv[1].bias, stride=(1, 2, 2))
        for half, conv in zip(padded.chunk(2, dim=1), (block.resample_2d, block.resample_3d), strict=True)
    )
    if not lead:
        flat, motion = flat[:, :, ::2], F.conv3d(motion, block.time_conv.weight, block.time_conv.bias, stride=(2, 1, 1))
    want = torch.cat([flat, motion], dim=1).permute(2, 0, 3, 4, 1)
    assert len(stripes(6, 5, CPU)) > 1
    close(Downsample(block, CPU, dtype)(x.to(dtype), state_of(lead, dtype)), want, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lead", [True, False])
def test_upsampling_equals_pytorch(monkeypatch, lead, dtype):
    monkeypatch.setattr("model.ivvae.fast.stream_state.STRIPE_PIXELS", 10)
    monkeypatch.setattr("model.ivvae.fast.stream_state.STRIPE_ROWS", 2)
    block = fill(Resample(4, 2, torch.nn.Conv3d(4, 8, 1)))
    x = draw(1 if lead else 2, 2, 6, 5, 8)
    flat, motion = x.permute(1, 4, 0, 2, 3).chunk(2, dim=1)
    if not lead:
        flat = flat.repeat_interleave(2, dim=2)
        motion = F.conv3d(motion, block.time_conv.weight, block.time_conv.bias)
        motion = torch.stack(motion.chunk(2, dim=1), dim=3).flatten(2, 3)
    halves = [
        F.conv3d(
            F.interpolate(half, scale_factor=(1, 2, 2), mode="nearest"),
            conv[1].weight[:, :, None],
            conv[1].bias,
            padding=(0, 1, 1),
        )
        for half, conv in ((flat, block.resample_2d), (motion, block.resample_3d))
    ]
    want = torch.cat(halves, dim=1).permute(2, 0, 3, 4, 1)
    close(Upsample(block, CPU, dtype)(x.to(dtype), state_of(lead, dtype)), want, dtype)
