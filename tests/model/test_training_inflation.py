"""An inflated IV-VAE treats every key frame as the image VAE does, which is written out here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import model
from model.ivvae.layers import DILATIONS
from model.training import inflation

CONFIG = {"dim": 4, "z_dim": 4, "dim_mult": [1, 2, 4, 4]}


class ImageVAE:
    """IV-VAE without time: one convolution where the video network has a pair. Images `N 3 H W`, latents `N z h w`."""

    def __init__(self, weights):
        self.w = weights

    def conv(self, x, key, **how):
        return F.conv2d(x, self.w[f"{key}.weight"], self.w[f"{key}.bias"], **how)

    def norm(self, x, key):
        halves = [F.normalize(half, dim=1) * half.shape[1] ** 0.5 for half in x.chunk(2, dim=1)]
        return torch.cat(halves, dim=1) * self.w[f"{key}.gamma"].flatten()[:, None, None]

    def residual(self, x, key):
        y = x
        for norm, conv in ((0, 2), (3, 6)):
            y = F.silu(self.norm(y, f"{key}.residual.{norm}"))
            y = self.conv(y, f"{key}.residual.{conv}.conv", padding=1)
        return y + (self.conv(x, f"{key}.shortcut.conv") if f"{key}.shortcut.conv.weight" in self.w else x)

    def attention(self, x, key):
        parts = []
        for half, branch in zip(x.chunk(2, dim=1), ("Attention_2d", "Attention_3d"), strict=True):
            at = f"{key}.{branch}"
            normed = F.normalize(half, dim=1) * half.shape[1] ** 0.5 * self.w[f"{at}.norm.gamma"]
            q, k, v = self.conv(normed, f"{at}.to_qkv").flatten(2).transpose(1, 2).chunk(3, dim=2)
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(half.shape)
            parts.append(half + self.conv(seen, f"{at}.proj"))
        return torch.cat(parts, dim=1)

    def resample(self, x, key, **how):
        halves = zip(x.chunk(2, dim=1), ("resample_2d", "resample_3d"), strict=True)
        return torch.cat([self.conv(half, f"{key}.{branch}.1", **how) for half, branch in halves], dim=1)

    def down(self, x, key):
        return self.resample(F.pad(x, (0, 1, 0, 1)), key, stride=2)

    def up(self, x, key):
        return self.resample(F.interpolate(x, scale_factor=2), key, padding=1)

    def through(self, x, prefix, kinds):
        layers = {"r": self.residual, "a": self.attention, "d": self.down, "u": self.up}
        for index, kind in enumerate(kinds):
            x = layers[kind](x, f"{prefix}.{index}")
        return x

    def encode(self, x):
        x = self.conv(x, "encoder.conv1.conv", padding=1)
        x = self.through(self.through(x, "encoder.downsamples", "rrdrrdrrdarara"), "encoder.middle", "rar")
        x = F.silu(self.norm(x, "encoder.head.0"))
        parts = [self.conv(x, "encoder.head.2.PAC_0.conv").chunk(2, dim=1)]
        for rate in DILATIONS:
            parts.append(self.conv(x, f"encoder.head.2.PAC_{rate}.conv", padding=rate, dilation=rate).chunk(2, dim=1))
        x = torch.cat([half for halves in zip(*parts, strict=True) for half in halves], dim=1)
        mean_2d, _, mean_3d, _ = self.conv(self.conv(x, "encoder.head.2.PAC_conv.conv"), "conv1.conv").chunk(4, dim=1)
        return torch.cat([mean_2d, mean_3d], dim=1)

    def decode(self, z):
        x = self.conv(self.conv(z, "conv2.conv"), "decoder.conv1.conv", padding=1)
        x = self.through(self.through(x, "decoder.middle", "rar"), "decoder.upsamples", "rararaurrrurrrurrr")
        return self.conv(F.silu(self.norm(x, "decoder.head.0")), "decoder.head.2.conv", padding=1)


def random_image_weights(seed=0):
    draw, weights = torch.Generator().manual_seed(seed), {}
    for key, meta in inflation.image_keys(CONFIG).items():
        noise = torch.randn(meta.shape, generator=draw)
        if key.endswith("gamma"):
            weights[key] = 1 + 0.1 * noise
        else:
            weights[key] = 0.1 * noise if noise.ndim == 1 else noise * noise[0].numel() ** -0.5
    return weights


@pytest.fixture(scope="module")
def pair():
    """The image VAE, and the video VAE inflated from it."""
    weights = random_image_weights()
    config = model.registry.complete("ivvae-z4-dim64", CONFIG)
    return ImageVAE(weights), model.from_state_dict("ivvae", config, inflation.inflate(CONFIG, weights))


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_images_are_coded_as_by_the_image_vae(pair):
    image, video = pair
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = video.encode(x[:, :, None])[0].mean
    close(z[:, :, 0], image.encode(x))
    close(video.decode(z)[0][:, :, 0], image.decode(z[:, :, 0]))


def test_a_static_video_has_the_image_in_every_frame(pair):
    image, video = pair
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    z = video.encode(x[:, :, None].repeat(1, 1, 9, 1, 1))[0].mean
    close(z, image.encode(x)[:, :, None].repeat(1, 1, 3, 1, 1))
    close(video.decode(z)[0], image.decode(image.encode(x))[:, :, None].repeat(1, 1, 9, 1, 1))


def test_key_frames_of_a_video_are_kept_and_repeated(pair):
    image, video = pair
    x = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    z = video.encode(x)[0].mean
    keys = x[0, :, [0, 1, 5]].transpose(0, 1)  # frame 0, and the first of each group of four
    close(z[0].transpose(0, 1), image.encode(keys))
    frames = image.decode(image.encode(keys))[[0, *[1] * 4, *[2] * 4]]
    close(video.decode(z)[0][0].transpose(0, 1), frames)


def test_kernels_are_inflated_at_their_centre():
    kernel = torch.arange(1.0, 19.0).reshape(1, 2, 3, 3)
    inflated = inflation.inflate_centre(kernel)
    assert inflated.shape == (1, 2, 3, 3, 3)
    assert torch.equal(inflated[:, :, 1], kernel)
    assert inflated.sum() == kernel.sum()
    for wrong, frames in ((kernel, 2), (kernel[0], 3)):
        with pytest.raises(ValueError, match="odd number of frames"):
            inflation.inflate_centre(wrong, frames)


def test_halving_keeps_one_frame_and_doubling_repeats():
    x = torch.rand(1, 3, 4, 5, 5)
    assert torch.equal(F.conv3d(x, inflation.halving_kernel(3), stride=(2, 1, 1)), x[:, :, ::2])
    causal = inflation.halving_kernel(3, (3, 3, 3), -1)  # the supplement's own shape: the last frame, centred in space
    assert torch.equal(F.conv3d(x, causal, padding=(0, 1, 1)), x[:, :, 2:])
    doubled = F.conv3d(x, inflation.doubling_kernel(3))
    assert torch.equal(doubled[:, :3], x)
    assert torch.equal(doubled[:, 3:], x)
    with pytest.raises(ValueError, match="no frame 2"):
        inflation.halving_kernel(3, frame=2)


def test_weights_of_another_image_vae_are_refused():
    weights = random_image_weights()
    weights["encoder.conv1.conv.weight"] = torch.zeros(8, 4, 3, 3)
    del weights["conv2.conv.bias"]
    with pytest.raises(ValueError, match=r"image VAE to inflate: 1 missing: conv2\.conv\.bias; 1 misshapen: encoder"):
        inflation.inflate(CONFIG, weights)
