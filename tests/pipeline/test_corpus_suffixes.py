"""Every video suffix belongs to a format that decodes: a real file of each is found in a folder and opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import PassedOver, resolve_inputs
from pipeline.records import VIDEO_EXTENSIONS
from pipeline.video.decode import open_video
from tests.pipeline.decoded import FAST, LIMITS, X265
from tests.video_files import write

if TYPE_CHECKING:
    from pathlib import Path

PAL: dict[str, Any] = {"size": (576, 720), "fps": 25, "frames": 2}
JPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}
H264 = {"codec": "libx264", "options": FAST}
# Suffixes, and a file as they name it.
MADE: dict[str, dict[str, Any]] = {
    "mp4 m4v mp4v mpg4 insv cmfv": {"container": "mp4", **H264},
    "mov qt mqv": {"container": "mov", **H264},
    "mj2 mjp2": {"container": "mov", "codec": "jpeg2000"},
    "f4v": {"container": "f4v", **H264},
    "3gp 3gpp": {"container": "3gp", "codec": "h263", "size": (96, 128)},
    "3g2 3gp2": {"container": "3g2", **H264},
    "ismv": {"container": "ismv", **H264},
    "mkv mk3d": {"container": "matroska", **H264},
    "webm": {"container": "webm", "codec": "libvpx"},
    "avi divx xvid": {"container": "avi", "codec": "mpeg4"},
    "ts m2ts mts m2t tp trp tod": {"container": "mpegts", **H264, "frames": 8},
    "mpg mpe": {"container": "mpeg", "codec": "mpeg1video"},
    "mpeg m2p vob evo vro": {"container": "vob", "codec": "mpeg2video"},
    "m1v mpv": {"container": "mpeg1video", "codec": "mpeg1video"},
    "m2v mp2v mpv2": {"container": "mpeg2video", "codec": "mpeg2video"},
    "asf wmv wm dvr-ms": {"container": "asf", "codec": "wmv2"},
    "flv": {"container": "flv", "codec": "flv"},
    "ogv ogm ogx": {"container": "ogg", "codec": "libvpx"},
    "mxf": {"container": "mxf", "codec": "mpeg2video", **PAL},
    "gxf": {"container": "gxf", "codec": "mpeg2video", **PAL},
    "dv dif": {"container": "dv", "codec": "dvvideo", **PAL},
    "gif": {"container": "gif", "codec": "gif", "pix_fmt": "rgb8", "fps": 10},
    "apng": {"container": "apng", "codec": "apng", "pix_fmt": "rgb24"},
    "nut": {"container": "nut", "codec": "mpeg4"},
    "rm rmvb rv": {"container": "rm", "codec": "rv10"},
    "wtv": {"container": "wtv", "codec": "mpeg2video"},
    "h264 264 avc h26l": {"container": "h264", **H264},
    "h265 265 hevc": {"container": "hevc", "codec": "libx265", "options": X265},
    "h263 263": {"container": "h263", "codec": "h263", "size": (96, 128)},
    "mjpeg mjpg": {"container": "mjpeg", **JPEG},
    "ivf": {"container": "ivf", "codec": "libvpx"},
    "obu av1": {"container": "obu", "codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "y4m": {"container": "yuv4mpegpipe", "codec": "wrapped_avframe"},
}
# No muxer or encoder in PyAV's libav: read by a format that is on the list of `pipeline.video.decode.container`.
NOT_MADE = "amv nsv vvc h266 266 vc1 cavs drc"


def test_every_suffix_has_a_test_file_or_a_reason_for_none() -> None:
    named = [suffix for suffixes in [*MADE, NOT_MADE] for suffix in suffixes.split()]
    assert sorted(named) == sorted(VIDEO_EXTENSIONS)


@pytest.mark.parametrize("suffixes", MADE)
def test_a_real_file_of_each_suffix_is_found_and_decodes(suffixes: str, tmp_path: Path) -> None:
    names = [f"a.{suffix}" for suffix in suffixes.split()]
    settings = {"frames": 4, **MADE[suffixes]}
    write(str(tmp_path / names[0]), **settings)
    for name in names[1:]:
        (tmp_path / name).hardlink_to(tmp_path / names[0])
    passed_over = PassedOver()
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig(), passed_over)
    assert sorted(source.uri for source in shard.objects) == sorted(str(tmp_path / name) for name in names)
    assert not passed_over
    video = open_video(shard.objects[0].uri, LIMITS)
    try:
        assert video.info.num_frames == settings["frames"]
        assert len(list(map(video.show, range(2)))) == 2
    finally:
        video.close()
