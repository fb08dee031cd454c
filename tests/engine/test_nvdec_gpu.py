"""On a GPU: NVDEC decodes, and the planes have the bits of libav's decoder and scaler."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.engine.nvdec import decoder
from pipeline.video.decode import hardware, open_video
from tests.odd_inputs import table
from tests.pipeline.decoded import X265, limits, planes
from tests.video_files import encode, textured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LARGE = {
    "size": (360, 640),
    "picture": textured,
}  # NVDEC decodes no frame of less than 48x16, HEVC and VP9 none below 128
KINDS = {
    "h264": {"options": {"x264-params": "keyint=12:bframes=2"}},
    "hevc": {"codec": "libx265", "options": X265},
    "vp9": {"codec": "libvpx-vp9", "container": "webm"},
    "rotated": {"rotation": 90},
    "full_range": {"pix_fmt": "yuvj420p", "tags": {"color_range": 2}},
    "left_out": {"size": (358, 638)},  # the codec crops its own edge
}


@pytest.fixture(scope="module", autouse=True)
def nvdec():
    decoder.start(decoder.Nvdec())
    yield
    hardware.install(None)


@pytest.mark.parametrize("kind", KINDS)
def test_nvdec_gives_the_planes_of_libav(kind):
    data = encode(40, **{**LARGE, **KINDS[kind]})
    video, other = (open_video(data, limits(device=device, nvdec_min_pixels=0)) for device in ("cuda", "cpu"))
    assert video.info.warnings[-1] == "nvdec"
    np.testing.assert_array_equal(planes(video, range(40), 90, 144), planes(other, range(40), 90, 144))
    video.close()
    other.close()


def test_frames_far_apart_are_found_by_a_jump():
    data = encode(200, **LARGE, **KINDS["h264"])
    video, other = (open_video(data, limits(device=device, nvdec_min_pixels=0)) for device in ("cuda", "cpu"))
    for index in (0, 90, 91, 199):
        np.testing.assert_array_equal(planes(video, [index], 90, 144), planes(other, [index], 90, 144))
    assert video.info.warnings[-1] == "nvdec"
    video.close()
    other.close()


def test_odd_inputs_have_the_planes_of_libav():
    decoders: Counter[str] = Counter()
    for odd in table.VIDEOS:
        data = odd.data()
        video, other = (open_video(data, limits(device=device, nvdec_min_pixels=0)) for device in ("cuda", "cpu"))
        frames = range(len(other.times_s))
        np.testing.assert_array_equal(planes(video, frames, 32, 48), planes(other, frames, 32, 48), err_msg=odd.name)
        decoders[video.info.warnings[-1]] += 1
        video.close()
        other.close()
    assert decoders["nvdec"] > 10, decoders


def test_a_size_that_nvdec_refuses_is_decoded_by_libav():
    data = encode(4, size=(64, 64), picture=textured, codec="libx265", options=X265)
    video = open_video(data, limits(device="cuda", nvdec_min_pixels=0))
    assert video.info.warnings[-1] in ("nvdec", "not_nvdec:refused")
    assert planes(video, [0]).shape[0] == 1
    video.close()
