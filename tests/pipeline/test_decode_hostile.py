"""Flipped, cut and removed bytes: the decoder raises a named error or decodes all frames."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.errors import BadDataError
from pipeline.records import ClipFailed, Sample, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from tests.video_files import encode, textured

ROUNDS = 60
CODECS = [
    ("libx264", "mp4", "yuv420p", {"preset": "ultrafast"}),
    ("libx264", "mpegts", "yuv420p", {"flags": "+ildct+ilme"}),
    ("libx265", "mp4", "yuv420p", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    ("libvpx-vp9", "matroska", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    ("libsvtav1", "matroska", "yuv420p", {"preset": "13"}),
    ("mpeg4", "avi", "yuv420p", {}),
    ("mjpeg", "avi", "yuvj420p", {}),
    ("libx264", "h264", "yuv420p", {}),
    ("libx264", "flv", "yuv420p", {}),
    ("prores_ks", "mov", "yuv422p10le", {}),
]
MODES = [("tile", "source"), ("uniform:3", 20.0), ("whole", "source")]


def harm(data: bytes, rng: random.Random) -> bytes:
    harmed = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(harmed[: rng.randrange(len(harmed))])
    if kind == 1:
        start = rng.randrange(len(harmed))
        del harmed[start : start + rng.randrange(1, 2000)]
        return bytes(harmed)
    reach = len(harmed) if kind == 2 else min(len(harmed), 1500)  # headers are changed more often
    for _ in range(rng.choice((1, 3, 20, 100))):
        harmed[rng.randrange(reach)] = rng.randrange(256)
    return bytes(harmed)


@pytest.mark.parametrize(("codec", "container", "pix_fmt", "options"), CODECS, ids=lambda value: str(value)[:10])
def test_damaged_files_are_rejected_with_a_reason_or_cut_completely(codec, container, pix_fmt, options):
    data = encode(24, codec=codec, container=container, pix_fmt=pix_fmt, options=options, picture=textured)
    limits = validate(DecodeConfig, {"max_duration_s": 600, "max_pixels": 1 << 20})
    rng = random.Random(f"{codec}/{container}")
    outcomes: Counter[str] = Counter()
    for round_number in range(ROUNDS):
        select, fps = MODES[round_number % len(MODES)]
        rules = resolve_rules(
            validate(ClipConfig, {"select": select, "fps": fps, "frames": 5, "size": "32x32"}), 4, 8, "test"
        )
        sample = Sample("key", 0, "uri", harm(data, rng), "mp4")
        cutter = Cutter(CutRequest(sample, rules, limits, 8, validate(DrillConfig, {})))
        try:
            opened = cutter.open()
        except BadDataError as error:
            outcomes[error.reason] += 1
            continue
        started, settled = set(), set()
        while not isinstance(answer := cutter.next(), VideoEnded):
            started.add(answer.clip)
            if isinstance(answer, ClipFailed):
                outcomes[f"clip {answer.reject.reason}"] += 1
                settled.add(answer.clip)
            elif answer.last:
                outcomes["clip"] += 1
                settled.add(answer.clip)
        assert started == settled == {plan.index for plan in opened.clips}
        cutter.close()
    assert sum(outcomes.values()) >= ROUNDS // 2
    assert any(reason != "clip" for reason in outcomes), "nothing was harmed"
    assert outcomes["clip"], "nothing survived"
