"""Tone mapping: the published curves at known points; greys stay neutral, order and hue are kept."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.video.decode.tonemap import REFERENCE_WHITE, hlg_to_light, light_to_pq, pq_to_light, roll_off, to_sdr


def limited_yuv(signal_rgb: list[float], bits: int = 16) -> np.ndarray:
    """BT.2020 non-constant-luminance YUV, limited range, one pixel `3x1x1` of R'G'B' in [0, 1]."""
    red, green, blue = signal_rgb
    luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
    scale = 1 << (bits - 8)
    planes = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8814, 128 + 224 * (red - luma) / 1.4746]
    return np.array(planes).reshape(3, 1, 1).__mul__(scale).round().astype(np.uint16)


@pytest.mark.parametrize(("light", "signal"), [(0.0, 0.0), (100.0, 0.508078), (1000.0, 0.751827), (10000.0, 1.0)])
def test_pq_at_the_points_of_st_2084(light, signal):
    assert light_to_pq(np.array(light)) == pytest.approx(signal, abs=1e-5)
    assert pq_to_light(np.array(signal)) == pytest.approx(light, rel=1e-4, abs=1e-6)


def test_hlg_at_the_points_of_bt_2408():
    # Reference white is 75 % HLG: 203 cd/m² on a 1000 cd/m² display. Full signal is the peak.
    grey = np.array([0.75, 1.0, 0.0])[None, None].repeat(3, axis=0).reshape(3, 1, 3)
    np.testing.assert_allclose(hlg_to_light(grey)[0, 0], [203, 1000, 0], atol=1.0)


def test_roll_off_keeps_shadows_and_ends_at_reference_white():
    light = np.array([0.1, 1.0, 10.0, 26.0])
    np.testing.assert_allclose(roll_off(light), light, rtol=1e-3)
    assert roll_off(np.array([1000.0, 4000.0])) == pytest.approx([REFERENCE_WHITE] * 2, rel=1e-3)
    rising = roll_off(np.geomspace(0.01, 1000, 200))
    assert (np.diff(rising) > 0).all()
    assert (rising <= np.geomspace(0.01, 1000, 200) * 1.001).all()


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_greys_stay_grey_and_in_order(transfer):
    levels = [to_sdr(limited_yuv([v, v, v]), 16, transfer)[:, 0, 0].tolist() for v in np.linspace(0, 1, 9)]
    lumas = [level[0] for level in levels]
    assert lumas == sorted(lumas)
    assert (lumas[0], lumas[-1]) == (16, 235)
    assert all(abs(chroma - 128) <= 1 for level in levels for chroma in level[1:])


def test_a_known_grey_comes_out_at_its_gamma():
    # 20 cd/m² lies below the knee: (20 / 203) ** (1 / 2.4) of SDR white.
    signal = float(light_to_pq(np.array(20.0)))
    luma = to_sdr(limited_yuv([signal] * 3), 16, "pq")[0, 0, 0]
    assert luma == pytest.approx(16 + 219 * (20 / 203) ** (1 / 2.4), abs=1)


def test_hue_of_a_bt709_red_survives():
    # BT.709 red at 100 cd/m², written in BT.2020 PQ, must come back as a pure red.
    linear_2020 = np.array([0.6274, 0.0691, 0.0164]) * 100
    signal = light_to_pq(linear_2020).tolist()
    luma, cb, cr = to_sdr(limited_yuv(signal), 16, "pq")[:, 0, 0].astype(float)
    red = (luma - 16) / 219 + 1.5748 * (cr - 128) / 224
    blue = (luma - 16) / 219 + 1.8556 * (cb - 128) / 224
    green = ((luma - 16) / 219 - 0.2126 * red - 0.0722 * blue) / 0.7152
    assert red > 0.6
    assert abs(green) < 0.06
    assert abs(blue) < 0.06


def test_bit_depth_only_scales():
    eight, sixteen = limited_yuv([0.5, 0.4, 0.3], 10), limited_yuv([0.5, 0.4, 0.3], 16)
    assert abs(to_sdr(eight, 10, "pq").astype(int) - to_sdr(sixteen, 16, "pq").astype(int)).max() <= 1
