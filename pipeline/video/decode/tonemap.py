"""Tone mapping of HDR to SDR: limited-range YUV 4:4:4 of BT.2100 PQ or HLG becomes 8-bit BT.709. Part of the decode package.

PQ or HLG -> cd/m² -> BT.2390 roll-off from 1000 cd/m² to reference white (203 cd/m², BT.2408) on the largest component, which keeps hues
-> BT.709 primaries -> BT.1886 (gamma 2.4). Mid-tones below the knee keep their luminance.
"""

from __future__ import annotations

import numpy as np

REFERENCE_WHITE = 203.0  # cd/m², shown as SDR white
SOURCE_PEAK = 1000.0  # cd/m², what most material is graded for; brighter light clips to it
M1, M2 = 2610 / 16384, 2523 / 4096 * 128
C1, C2, C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
HLG_GAMMA = 1.2  # system gamma of a 1000 cd/m² display
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
LUMA_709 = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
# Linear BT.2020 -> linear BT.709 (BT.2087).
TO_709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
    dtype=np.float32,
)


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084 signal in [0, 1] -> cd/m²."""
    power = np.power(np.clip(signal, 0, 1), 1 / M2)
    return 10000.0 * np.power(np.maximum(power - C1, 0) / (C2 - C3 * power), 1 / M1)


def light_to_pq(light: np.ndarray | np.floating) -> np.ndarray:
    """cd/m² -> SMPTE ST 2084 signal in [0, 1]."""
    power = np.power(np.clip(light / 10000.0, 0, 1), M1)
    return np.power((C1 + C2 * power) / (1 + C3 * power), M2)


def hlg_to_light(signal_3HW: np.ndarray) -> np.ndarray:
    """ARIB STD-B67 R'G'B' in [0, 1] -> cd/m² on a 1000 cd/m² display (BT.2100 inverse OETF, then OOTF)."""
    signal_3HW = np.clip(signal_3HW, 0, 1)
    low = signal_3HW**2 / 3
    high = (np.exp((signal_3HW - HLG_C) / HLG_A) + HLG_B) / 12
    scene_3HW = np.where(signal_3HW <= 0.5, low, high)
    luminance = np.tensordot(LUMA_2020, scene_3HW, axes=1)
    return SOURCE_PEAK * np.power(np.maximum(luminance, 1e-6), HLG_GAMMA - 1) * scene_3HW


def roll_off(light: np.ndarray) -> np.ndarray:
    """BT.2390 EETF from the source's peak to reference white; cd/m² -> cd/m², the identity below the knee."""
    peak = light_to_pq(np.float32(SOURCE_PEAK))
    target = light_to_pq(np.float32(REFERENCE_WHITE)) / peak
    knee = 1.5 * target - 0.5
    signal = np.clip(light_to_pq(light) / peak, 0, 1)
    t = (signal - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * target
    return pq_to_light(np.where(signal < knee, signal, spline) * peak)


def to_sdr(planes_3HW: np.ndarray, bits: int, transfer: str) -> np.ndarray:
    """Limited-range BT.2020 YUV `3HW` of `bits` bits (uint16), transfer "pq" or "hlg" -> limited-range BT.709 YUV `3HW` (uint8)."""
    scale = np.float32(1 << (bits - 8))
    luma = (planes_3HW[0] / scale - 16) / 219
    cb, cr = (planes_3HW[1] / scale - 128) / 224, (planes_3HW[2] / scale - 128) / 224
    red, blue = luma + 1.4746 * cr, luma + 1.8814 * cb
    green = (luma - LUMA_2020[0] * red - LUMA_2020[2] * blue) / LUMA_2020[1]
    signal_3HW = np.stack([red, green, blue]).astype(np.float32)
    light_3HW = pq_to_light(signal_3HW) if transfer == "pq" else hlg_to_light(signal_3HW)
    largest = np.maximum(light_3HW.max(axis=0), 1e-4)
    light_3HW = light_3HW * (roll_off(largest) / largest)
    linear_3HW = np.tensordot(TO_709, light_3HW / REFERENCE_WHITE, axes=1)
    return _to_yuv(np.power(np.clip(linear_3HW, 0, 1), 1 / 2.4))


def _to_yuv(rgb_3HW: np.ndarray) -> np.ndarray:
    luma = np.tensordot(LUMA_709, rgb_3HW, axes=1)
    cb = (rgb_3HW[2] - luma) / 1.8556
    cr = (rgb_3HW[0] - luma) / 1.5748
    planes_3HW = np.stack([16 + 219 * luma, 128 + 224 * cb, 128 + 224 * cr])
    return np.clip(np.rint(planes_3HW), 0, 255).astype(np.uint8)
