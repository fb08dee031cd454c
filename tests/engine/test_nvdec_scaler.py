"""Scaling by matrices gives the bits of libav's scaler, on the CPU; `test_nvdec_gpu.py` does the same on a GPU."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from pipeline.engine.nvdec import bicubic
from pipeline.engine.nvdec.scaler import CHROMA_POSITIONS, LUMA, DeviceScaler, chroma_position
from pipeline.errors import WorkerLost
from pipeline.video.decode.orientation import Orientation
from pipeline.video.decode.planes import Geometry, Scaler
from tests.pipeline.decoded import X265
from tests.video_files import encode, textured

UPRIGHT, TURNED, MIRRORED = Orientation(), Orientation(True, True, False), Orientation(False, True, True)
# Size of the frame, scaled size as displayed, orientation, whether it is of full range.
CASES = [
    ((96, 160), (32, 56), UPRIGHT, False),
    ((96, 160), (32, 56), UPRIGHT, True),
    ((96, 160), (57, 34), TURNED, False),
    ((96, 160), (33, 55), MIRRORED, True),
    ((96, 160), (96, 160), UPRIGHT, False),
    ((96, 160), (96, 160), TURNED, True),
    ((48, 64), (97, 130), UPRIGHT, False),
    ((48, 64), (47, 65), UPRIGHT, True),
    ((1080, 1920), (18, 32), UPRIGHT, False),
    ((32, 640), (256, 20), UPRIGHT, False),
    ((16, 16), (16, 64), UPRIGHT, False),
]


def noise(height: int, width: int, *, full: bool) -> av.VideoFrame:
    frame, draw = av.VideoFrame(width, height, "yuv420p"), np.random.default_rng(height * width)
    for plane in frame.planes:
        plane.update(draw.integers(0, 256, plane.buffer_size, np.uint8).tobytes())
    frame.color_range = 2 if full else 1
    return frame


def interleaved(frame: av.VideoFrame) -> av.VideoFrame:
    """The same samples as NV12, as NVDEC gives them."""
    made = frame.reformat(format="nv12", threads=1)
    made.color_range = 2 if frame.format.name == "yuvj420p" else frame.color_range
    return made


def both(frame, scaled, orientation, position) -> tuple[np.ndarray, np.ndarray]:
    geometry = Geometry(*scaled, 3, 2, scaled[0] - 7, scaled[1] - 4)  # a window
    ours, theirs = np.zeros((2, 3, geometry.height, geometry.width), np.uint8)
    DeviceScaler(orientation, position, "cpu").write(interleaved(frame), geometry, ours)
    Scaler(orientation, "sdr").write(frame, geometry, theirs)
    return ours, theirs


@pytest.mark.parametrize(("size", "scaled", "orientation", "full"), CASES)
def test_planes_have_the_bits_of_libavs_scaler(size, scaled, orientation, full):
    ours, theirs = both(noise(*size, full=full), scaled, orientation, LUMA)
    np.testing.assert_array_equal(ours, theirs)


def test_chroma_is_found_at_each_place_that_streams_are_tagged_with():
    tagged = [encode(1, size=(48, 80), picture=textured, options={"x264-params": f"chromaloc={n}"}) for n in range(6)]
    tagged.append(encode(1, size=(48, 80), picture=textured, codec="libvpx-vp9", container="webm"))  # untagged
    tagged.append(encode(4, size=(48, 80), picture=textured, codec="libx265", options=X265))
    found = []
    for data in tagged:
        frame = first_frame(data)
        position = chroma_position(frame)
        assert position is not None
        ours, theirs = both(frame, (24, 42), UPRIGHT, position)
        np.testing.assert_array_equal(ours, theirs)
        found.append(position)
    assert set(found) == set(CHROMA_POSITIONS)


def first_frame(data: bytes) -> av.VideoFrame:
    with av.open(io.BytesIO(data)) as container:
        return next(container.decode(video=0))


def test_weights_of_a_row_add_up_to_one():
    for source, target in ((1920, 456), (75, 384), (7680, 16), (4, 16)):
        assert set(bicubic.across(source, target).sum(axis=1)) == {1 << bicubic.ACROSS_BITS}
        assert set(bicubic.down(source, target).sum(axis=1)) == {1 << bicubic.DOWN_BITS}


def test_a_fault_of_the_device_is_not_blamed_on_the_video():
    scaler = DeviceScaler(UPRIGHT, LUMA, "cpu")
    with pytest.raises(WorkerLost, match="GPU failed while scaling") as caught:
        scaler.write(noise(32, 32, full=False), Geometry(16, 16, 0, 0, 16, 16), np.zeros((3, 16, 16), np.uint8))
    assert (
        not caught.value.blame
    )  # three planes where NV12 has two: torch's or libav's error, as a broken driver raises them
