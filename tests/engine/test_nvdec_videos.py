"""Videos decoded with `decode.device: cuda`, by `FakeNvdec`: pixels and rejects are those of libav; rows say what decoded them."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

import pipeline
from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.encoder import Network
from pipeline.engine.nvdec import decoder
from pipeline.engine.nvdec.lanes import NvdecLanes, visible
from pipeline.engine.worker import build_context, pool
from pipeline.engine.worker.build_context import check_decode_device, make_context
from pipeline.errors import ConfigError, WorkerLost
from pipeline.records import ClipFailed, EncodedVideo, FrameChunk, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.decode import hardware, open_video
from tests.engine.fake_nvdec import FakeLanes, FakeNvdec
from tests.odd_inputs import damage
from tests.pipeline.cropped_files import with_pixel_crop
from tests.pipeline.decoded import FAST, HDR, X265, limits, planes
from tests.pipeline.latent_clips import SPEC
from tests.tiny_corpus import receipts, rows, tiny_job, write_tar
from tests.video_files import encode, textured, write

CUDA = {"device": "cuda", "nvdec_min_pixels": 0}
PICTURES = {"size": (48, 80), "picture": textured}
DENSE = {"options": {"preset": "ultrafast", "x264-params": "keyint=12:bframes=2:b-adapt=0"}}
SCALED = 20, 36


@pytest.fixture
def fake():
    made = FakeNvdec()
    hardware.install(made)
    yield made
    hardware.install(None)


def opened(data: bytes, **settings):
    return open_video(data, limits(**CUDA, **settings))


def assert_same(data: bytes, count: int, **settings) -> tuple[str, ...]:
    """All frames have the same bits on both decoders. Returns the warnings."""
    video, other = opened(data, **settings), open_video(data, limits(**settings))
    assert len(video.times_s) == count
    np.testing.assert_array_equal(planes(video, range(count), *SCALED), planes(other, range(count), *SCALED))
    assert video.info.warnings[:-1] == other.info.warnings
    warnings = video.info.warnings
    video.close()
    other.close()
    return warnings


TAKEN = {
    "b_frames": DENSE,
    "hevc": {"codec": "libx265", "options": X265},
    "vp9": {"codec": "libvpx-vp9", "container": "webm"},
    "rotated": {"rotation": 90, "options": FAST},
    "mirrored": {"rotation": 180, "hflip": True, "options": FAST},
    "full_range": {"pix_fmt": "yuvj420p", "tags": {"color_range": 2}, "options": FAST},
    "variable_rate": {"pts": [0, 1, 5, 6, 7, 20, 21, 30, 40, 41], "options": FAST},
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_video_that_nvdec_takes_has_the_pixels_and_times_of_libav(kind, fake):
    assert assert_same(encode(10, **PICTURES, **TAKEN[kind]), 10)[-1] == "nvdec"
    assert fake.frames >= 10


NOT_TAKEN = {
    "codec": {"codec": "mpeg4"},
    "pixel_format": {"pix_fmt": "yuv444p", "options": FAST},
    "odd_size": {"size": (47, 81), "pix_fmt": "yuv444p", "codec": "libx264", "options": FAST},
    "interlaced": {"options": {"x264-params": "tff=1", "preset": "ultrafast"}},
    "hdr": {"codec": "libx265", "options": X265, "tags": HDR},
    "small": {"options": FAST},
}


@pytest.mark.parametrize("reason", NOT_TAKEN)
def test_a_video_that_nvdec_cannot_do_by_our_rules_stays_with_libav(reason, fake):
    if reason == "odd_size":  # libx264 takes odd sides of 4:2:0 only through cropping of its own, libvpx as they are
        data = encode(4, size=(47, 81), picture=odd, codec="libvpx-vp9", container="webm")
    else:
        data = encode(4, **{**PICTURES, **NOT_TAKEN[reason]})
    settings = {"hdr": "convert"} | ({"nvdec_min_pixels": 48 * 80 + 1} if reason == "small" else {})
    video = open_video(data, validate(DecodeConfig, {**CUDA, **settings}))
    assert video.info.warnings[-1] == f"not_nvdec:{reason}"
    assert fake.opened == 0
    video.close()


def odd(index: int, width: int, height: int) -> np.ndarray:
    import av

    frame = av.VideoFrame(width, height, "yuv420p")
    for plane in frame.planes:
        plane.update(bytes([40 + index * 9]) * plane.buffer_size)
    return frame


def test_a_container_that_crops_stays_with_libav(fake):
    data = with_pixel_crop(encode(4, container="matroska", **PICTURES, options=FAST), left=8, right=8)
    assert assert_same(data, 4)[-1] == "not_nvdec:cropped"


def test_a_first_frame_with_other_pixels_sends_the_video_to_libav(fake):
    fake.wrong_from = 0
    assert assert_same(encode(6, **PICTURES, options=FAST), 6)[-1] == "not_nvdec:other_pixels"


def test_a_video_that_nvdec_refuses_goes_to_libav(fake):
    fake.refuses = True
    assert assert_same(encode(6, **PICTURES, options=FAST), 6)[-1] == "not_nvdec:refused"


def test_frames_far_apart_are_found_by_a_jump(fake):
    data = encode(100, **PICTURES, **DENSE)
    video, other = opened(data), open_video(data, limits())
    for index in (0, 3, 60, 61, 99):
        np.testing.assert_array_equal(planes(video, [index], *SCALED), planes(other, [index], *SCALED))
    assert video.info.warnings[-1] == "nvdec"
    assert video.frames_decoded < 100
    video.close()
    other.close()


@pytest.mark.parametrize("policy", ["reject", "warn"])
@pytest.mark.parametrize("kind", ["h264-b-mkv", "hevc-mkv"])
def test_what_follows_damage_is_decided_by_libav(kind, policy, fake):
    data = damage.edited(damage.KINDS[kind], damage.harming(30, 50))
    ours, theirs = cut(data, damage=policy, **CUDA), cut(data, damage=policy)
    assert [type(answer) for answer in ours] == [type(answer) for answer in theirs]
    assert any(isinstance(answer, ClipFailed) or answer.damaged for answer in ours)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, FrameChunk):
            np.testing.assert_array_equal(one.planes_T3HW, other.planes_T3HW)
            assert (one.clip, one.pts_s, one.damaged) == (other.clip, other.pts_s, other.damaged)
        else:
            assert one == other
    assert fake.opened == 1


def request(data: bytes, **settings) -> CutRequest:
    rules = resolve_rules(validate(ClipConfig, {"size": "32x48", "frames": 5, "select": "tile"}), 4, 8, "leanvae")
    return CutRequest(
        EncodedVideo("key", "uri", data), rules, validate(DecodeConfig, settings), 8, validate(DrillConfig, {})
    )


def cut(data: bytes, **settings) -> list[FrameChunk | ClipFailed]:
    cutter = Cutter(request(data, **settings))
    cutter.open()
    answers: list[FrameChunk | ClipFailed] = []
    while not isinstance(answer := cutter.next(), VideoEnded):
        answers.append(answer)
    return answers


# --- decoder processes ------------------------------------------------------------------------------------------------


def collect(lanes, count):
    answers, deadline = [], time.monotonic() + 240
    while len(answers) < count:
        assert time.monotonic() < deadline, f"only {answers}"
        answers += lanes.wait(0.2)
    return answers


def test_a_build_has_the_latents_of_libav_and_its_receipt_counts_decoders(tmp_path, monkeypatch):
    """The whole build, with processes that check NVDEC first; the GPU alone is missing."""
    write_tar(tmp_path / "a.tar", {"a": {"mp4": encode(10, **PICTURES, options=FAST)}, "b": {"mp4": MPEG4}})
    plain = tiny_job(tmp_path / "a.tar", tmp_path / "plain")
    pipeline.encode(plain)
    monkeypatch.setattr(build_context, "check_decode_device", lambda decode, network: None)
    monkeypatch.setattr(pool, "NvdecLanes", lambda count, memory, device: FakeLanes(count, memory, "cuda"))
    cuda = [f"decode.{name}={value}" for name, value in CUDA.items()]
    job = tiny_job(tmp_path / "a.tar", tmp_path / "cuda", *cuda)
    pipeline.encode(job)
    ours, theirs = rows(job.output), rows(plain.output)
    by_key = {row["source_key"]: row["warnings"][-1] for row in ours.values()}
    assert by_key == {"a": "nvdec", "b": "not_nvdec:codec"}
    assert latents(ours) == latents(theirs)
    (receipt,) = receipts(job.output)
    assert {name: n for name, n in receipt.warnings.items() if "nvdec" in name} == {"nvdec": 1, "not_nvdec": 1}


MPEG4 = encode(10, **PICTURES, codec="mpeg4")


def latents(found: dict[str, dict]) -> list[tuple[str, bytes]]:
    return sorted((row["source_key"], row["vae_latent_bytes"]) for row in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_decoder_process_without_a_gpu_says_so_before_any_video():
    lanes = NvdecLanes(1, 4 << 30, "cuda")
    try:
        ((lane, ticket, lost),) = collect(lanes, 1)
        assert (lane, ticket) == (0, -1)
        assert isinstance(lost, WorkerLost)
        assert "NVDEC cannot be used on this machine" in lost.message
        assert "decode.device=cpu" in lost.message
        assert lanes.wait(0.0) == []  # it waits to be replaced: its exit would be a second loss
    finally:
        lanes.close()


def test_a_decoder_that_gives_other_pixels_is_found_before_any_video():
    with pytest.raises(WorkerLost, match="samples of a test video differ from those decoded on the CPU"):
        decoder.start(FakeNvdec(wrong_from=3))
    hardware.install(None)


def test_a_process_without_a_hardware_decoder_does_not_fall_back_silently():
    with pytest.raises(RuntimeError, match="no hardware decoder"):
        hardware.installed()


def test_a_job_that_decodes_on_a_gpu_has_another_fingerprint(tmp_path):
    fingerprints = set()
    for settings in ({}, {"device": "cuda"}, CUDA):
        job = tiny_job([tmp_path], tmp_path / "out", *(f"decode.{name}={value}" for name, value in settings.items()))
        rules = resolve_rules(job.clips, SPEC.time_stride, SPEC.space_stride, "leanvae", SPEC.lead_frames)
        context = make_context(job, rules, Network(SPEC, {}, {}), "cuda", "float32")
        assert ("nvdec" in context.fingerprint_parts) == bool(settings)
        fingerprints.add(context.fingerprint)
    assert len(fingerprints) == 3


def test_a_job_that_decodes_on_a_gpu_and_encodes_on_a_cpu_is_refused():
    check_decode_device("cuda", "cuda:1")
    check_decode_device("cpu", "cpu")
    with pytest.raises(ConfigError, match=r"decode\.device: cuda.*network runs on the CPU.*decode\.device=cpu"):
        check_decode_device("cuda", "cpu")


def test_a_build_without_a_gpu_is_refused_before_anything_is_written(tmp_path):
    write(str(tmp_path / "a.mp4"), 5, **PICTURES, options=FAST)
    job = tiny_job([tmp_path / "a.mp4"], tmp_path / "out", "decode.device=cuda", "model.device=cpu")
    with pytest.raises(ConfigError, match="network runs on the CPU"):
        pipeline.encode(job)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_decoders_see_the_gpu_of_their_encoder_alone():
    assert visible("cuda", None) == "0"
    assert visible("cuda:2", None) == "2"
    assert visible("cuda", "5") == "5"  # as Ray sets it
    assert visible("cuda:1", "4,GPU-7a") == "GPU-7a"
