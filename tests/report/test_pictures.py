"""Decoded clips of a report, on a small build: qualities, pictures that open, sources and weights that are gone."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import model
import pipeline
from pipeline.config import StorageConfig
from pipeline.errors import CheckpointError
from pipeline.look.preview import preview
from pipeline.operate.publish import PublishOptions, publish
from pipeline.report import pictures as made
from pipeline.report.collect import ReportOptions, collect
from pipeline.report.page import page_of
from pipeline.report.pictures import Pictures, decode_clips
from pipeline.storage import open_store
from tests.tiny_corpus import TINY_NETWORK, tiny_job, video_bytes

STORAGE = StorageConfig()


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Snapshot 1 of two plain files with three clips, encoded by weights in a file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.mp4").write_bytes(video_bytes(13, seed=1))
    (folder / "corpus" / "b.mp4").write_bytes(video_bytes(5, seed=2))
    network = model.load("leanvae", config=TINY_NETWORK, untrained=3).network
    weights = folder / "weights.safetensors"
    save_file({key: value.detach().clone() for key, value in network.state_dict().items()}, weights)
    flags = {"model.checkpoint": str(weights), "model.untrained": None}
    job = tiny_job(folder / "corpus", folder / "out", "clips.size=64x64", **flags)
    pipeline.encode(job)
    publish(open_store(job.output, STORAGE), PublishOptions())
    return job


def decoded(job, wanted=8, checkpoint=None):
    return decode_clips(open_store(job.output, STORAGE), 1, STORAGE, wanted, checkpoint, "cpu")


def test_qualities_are_those_of_the_preview_and_pictures_open(job, tmp_path):
    found, pictures, notices = decoded(job)
    account = preview(job.output, STORAGE, sheet=str(tmp_path / "sheet.png"))
    expected = {row["id"]: row["psnr"] for row in account["clips"]}
    assert {clip.id: clip.psnr for clip in found.clips} == pytest.approx(expected)
    assert [clip.psnr for clip in found.clips] == sorted(expected.values())
    assert (notices, found.without_original) == ([], 0)
    for clip in found.clips:
        assert np.mean(clip.frame_psnr) == pytest.approx(clip.psnr, abs=1e-3)
        still, play = (Image.open(io.BytesIO(pictures.by_name[clip.pictures[kind]])) for kind in ("still", "play"))
        assert still.size == (3 * 64 + 2 * made.GAP, 2 * 64 + made.GAP)
        assert (play.size, play.n_frames) == ((2 * 64 + made.GAP, 64), 5)
    first = np.mean([clip.frame_ssim[0] for clip in found.clips])
    others = np.mean([clip.frame_ssim[1:] for clip in found.clips])
    assert found.positions == pytest.approx((first, others), abs=1e-4)
    channels = [name for name in pictures.by_name if name.startswith("channel-")]
    assert len(channels) == 4
    assert Image.open(io.BytesIO(pictures.by_name["channel-0"])).size == (8 + 1 + 8, 8)


def test_sources_that_are_gone_leave_decoded_pictures_and_a_notice(job, tmp_path):
    shutil.move(folder := job.inputs[0], tmp_path / "aside")
    try:
        found, pictures, notices = decoded(job, wanted=2)
    finally:
        shutil.move(tmp_path / "aside", folder)
    assert [(clip.psnr, clip.shown) for clip in found.clips] == [(None, "random")] * 2
    assert notices == [
        "the sources of 3 clips cannot be read any more or have changed; decoded pictures are shown without originals"
    ]
    still = Image.open(io.BytesIO(pictures.by_name[found.clips[0].pictures["still"]]))
    assert still.size == (3 * 64 + 2 * made.GAP, 64)


def test_weights_that_are_gone_leave_a_page_without_pictures(job, tmp_path):
    shutil.move(weights := job.model.checkpoint, aside := tmp_path / "aside.safetensors")
    try:
        report, pictures = collect(open_store(job.output, STORAGE), None, STORAGE, ReportOptions(device="cpu"))
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            decoded(job, checkpoint=weights)
        again, _, notices = decoded(job, checkpoint=str(aside))
    finally:
        shutil.move(aside, weights)
    assert pictures == Pictures()
    assert (
        "the page has no decoded pictures, because its network cannot be loaded: model: no checkpoint at"
        in report.notices[0]
    )
    assert "No clip was decoded" in page_of(report, pictures).decode()
    assert len(again.clips) == 3
    assert notices == []


def test_pictures_stay_within_their_bytes(job, monkeypatch):
    whole = decoded(job)[1].by_name
    monkeypatch.setattr(made, "PICTURE_BYTES", 4 * 3000)
    small = decoded(job)[1].by_name
    assert whole.keys() == small.keys()
    sizes = [sum(len(data) for name, data in each.items() if "channel" not in name) for each in (whole, small)]
    assert sizes[1] < 0.75 * sizes[0]


def test_worst_median_best_and_others_are_chosen_once():
    def clip(n):
        video = np.zeros((1, 4, 4, 3), np.uint8)
        about = {
            "id": f"c{n}",
            "key": "k",
            "source": "s",
            "bucket": "v1x4x4",
            "variant": "base",
            "frames": 1,
            "fps": 1.0,
        }
        quality = {"psnr": float(n), "ssim": None, "frame_psnr": (), "frame_ssim": (), "shown": None, "caption": None}
        return made.MeasuredClip(made.Clip(**about, **quality), video, video, np.zeros((1, 1, 1, 1)))

    found = made.chosen_clips([clip(n) for n in range(20)])
    groups = {
        name: [item.clip.id for item in found.values() if item.clip.shown == name]
        for name in ("worst", "median", "best")
    }
    assert groups == {"worst": ["c0", "c1", "c2"], "median": ["c8", "c9", "c10"], "best": ["c17", "c18", "c19"]}
    assert sum(item.clip.shown == "random" for item in found.values()) == 3
    assert len(made.chosen_clips([clip(n) for n in range(2)])) == 2
