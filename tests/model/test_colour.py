"""Conversion of uint8 planes: known colours of the standards, clamping, and the same latents as for float video."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.colour import LUMA, rgb_to_yuv, yuv_to_video

# 75 % and 100 % bars as the standards tabulate them: (matrix, R G B in [0, 1], Y U V)
KNOWN = [
    ("bt601", (1, 1, 1), (235, 128, 128)),
    ("bt709", (0, 0, 0), (16, 128, 128)),
    ("bt601", (1, 0, 0), (81, 90, 240)),
    ("bt601", (0, 1, 0), (145, 54, 34)),
    ("bt601", (0, 0, 1), (41, 240, 110)),
    ("bt709", (1, 0, 0), (63, 102, 240)),
    ("bt709", (0, 1, 0), (173, 42, 26)),
    ("bt709", (0, 0, 1), (32, 240, 118)),
    ("bt2020nc", (1, 0, 0), (74, 97, 240)),
    ("bt2020nc", (0, 0, 1), (29, 240, 119)),
]


def planes(yuv: tuple[int, int, int], frames: int = 1) -> torch.Tensor:
    return torch.tensor(yuv, dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, frames, 3, 8, 8).contiguous()


@pytest.mark.parametrize(("matrix", "rgb", "yuv"), KNOWN)
def test_known_colours_convert_in_both_directions(matrix, rgb, yuv):
    video = torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1, 1).expand(1, 3, 1, 8, 8) - 0.5
    assert torch.equal(rgb_to_yuv(video, [matrix]), planes(yuv))
    back = yuv_to_video(planes(yuv), [matrix])
    assert (back - video).abs().max() < 1.5 / 219  # half a step of each plane


def test_conversion_agrees_with_the_standards_matrix_and_clamps():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 5, 3, 8, 16), dtype=torch.uint8, generator=generator)
    matrices = list(LUMA)
    for low, high in ((-0.5, 0.5), (-1.0, 1.0)):
        got = yuv_to_video(raw, matrices, (low, high)).double().numpy()
        for b, (kr, kb) in enumerate(LUMA.values()):
            kg = 1 - kr - kb
            forward = np.array(
                [
                    [kr, kg, kb],
                    [-kr / (1 - kb) / 2, -kg / (1 - kb) / 2, 0.5],
                    [0.5, -kg / (1 - kr) / 2, -kb / (1 - kr) / 2],
                ]
            )
            code = (raw[b].double().numpy() - np.array([16, 128, 128])[:, None, None]) / np.array([219, 224, 224])[
                :, None, None
            ]
            rgb = np.einsum("rc,tchw->rthw", np.linalg.inv(forward), code)
            want = low + (high - low) * rgb.clip(0, 1)
            np.testing.assert_allclose(got[b], want, atol=2e-6)
        assert got.min() == low
        assert got.max() == high


@pytest.mark.parametrize("matrix", list(LUMA))
def test_round_trip_error_is_within_one_code_value(matrix):
    generator = torch.Generator().manual_seed(1)
    video = torch.rand((1, 3, 2, 16, 16), generator=generator) - 0.5
    once = rgb_to_yuv(video, [matrix])
    again = rgb_to_yuv(yuv_to_video(once, [matrix]), [matrix])
    assert (once.int() - again.int()).abs().max() <= 1


def test_planes_and_float_video_give_the_same_latents(vae):
    generator = torch.Generator().manual_seed(2)
    raw = torch.randint(0, 256, (2, 9, 3, 16, 24), dtype=torch.uint8, generator=generator)
    matrices = ["bt709", "bt601"]
    video = yuv_to_video(raw, matrices)
    posterior, _ = vae.encode_planes(raw, matrices, moments=True)
    want, _ = vae.encode(video, moments=True)
    assert torch.equal(posterior.mean, want.mean)
    assert torch.equal(posterior.logvar, want.logvar)
    first, state = vae.encode_planes(raw[:, :5], matrices)
    second, _ = vae.encode_planes(raw[:, 5:], matrices, state)
    assert torch.equal(torch.cat([first.mean, second.mean], dim=2), want.mean)


@pytest.mark.parametrize(
    ("raw", "matrices", "words"),
    [
        (torch.zeros(1, 5, 3, 16, 16), ["bt709"], r"uint8 YUV planes.*torch.float32"),
        (torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8), ["bt709"], r"\(B, T, 3, H, W\).*\(1, 3, 5, 16, 16\)"),
        (torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8), ["bt709"], "got 4; nearest that fit: 1 or 5"),
        (torch.zeros(1, 5, 3, 12, 16, dtype=torch.uint8), ["bt709"], "height 12"),
        (torch.zeros(2, 5, 3, 16, 16, dtype=torch.uint8), ["bt709"], r"one colour matrix per video \(2\)"),
        (torch.zeros(1, 5, 3, 16, 16, dtype=torch.uint8), "bt709", "one colour matrix per video"),
        (torch.zeros(1, 5, 3, 16, 16, dtype=torch.uint8), ["smpte170m"], "bt601, bt709, bt2020nc; got 'smpte170m'"),
    ],
)
def test_bad_planes_are_refused(vae, raw, matrices, words):
    with pytest.raises(ValueError, match=words):
        vae.encode_planes(raw, matrices)
