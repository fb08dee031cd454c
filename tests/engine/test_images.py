"""A build over videos and images: rows, latents, counts, what is encoded again by later checks, and builds without any clip."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

import model
import pipeline
from pipeline.config import StorageConfig
from pipeline.errors import NothingEncoded
from pipeline.forecast.survey import forecast_job
from pipeline.ledger.candidate import gather
from pipeline.look.canary import canary_check
from pipeline.operate.publish import list_inputs
from pipeline.storage import open_store
from tests.tiny_corpus import TINY_NETWORK, receipts, rows, tiny_job, video_bytes, write_tar

GREY = {"a": 60, "b": 120, "c": 200}


def picture(level: int, kind: str = "png", height: int = 32, width: int = 48) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(target, {"jpg": "jpeg"}.get(kind, kind))
    return target.getvalue()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tar of two images and a video with a thumbnail, a folder of two images, one with a caption, and a video with a thumbnail."""
    folder = tmp_path_factory.mktemp("images")
    video = video_bytes(5)
    write_tar(
        folder / "000.tar",
        {
            "a": {"png": picture(GREY["a"]), "txt": b"in a tar"},
            "b": {"jpg": picture(GREY["b"], "jpg"), "json": b'{"from": "camera"}'},
            "v": {"jpg": picture(0, "jpg"), "mp4": video},
        },
    )
    (folder / "plain").mkdir()
    for name, data in {
        "c.webp": picture(GREY["c"], "webp"),
        "c.txt": b"in a folder",
        "w.jpg": picture(0, "jpg"),
        "w.mp4": video,
    }.items():
        (folder / "plain" / name).write_bytes(data)
    job = tiny_job(folder, folder / "out", **{"images.policy": "keep", "images.size": "32x48"})
    report = pipeline.encode(job)
    return folder, job, report


def test_images_are_rows_of_one_frame_beside_videos(built):
    found = {row["source_key"]: row for row in rows(built[1].output).values()}
    assert sorted(found) == ["a", "b", "c", "v", "w"]
    for key, row in found.items():
        is_image = key in GREY
        expected = ("image", "v1x32x48", 1, 0.0, 0.0) if is_image else ("video", "v5x32x32", 5, 8.0, 0.5)
        names = ("media_type", "bucket", "num_frames", "fps", "duration_sec")
        assert tuple(row[name] for name in names) == expected
    assert [found[key]["caption"] for key in "abc"] == ["in a tar", None, "in a folder"]
    assert [found[key]["codec"] for key in "abc"] == ["png", "jpeg", "webp"]


def test_the_latent_of_an_image_is_that_of_its_planes(built):
    network = model.load("leanvae", config=TINY_NETWORK, untrained=0)
    (row,) = (row for row in rows(built[1].output).values() if row["source_key"] == "a")
    planes_13HW = np.full((1, 3, 32, 48), 128, np.uint8)
    planes_13HW[:, 0] = round(16 + GREY["a"] * 219 / 255)
    with torch.inference_mode():
        posterior, _ = network.encode_planes(torch.from_numpy(planes_13HW)[None], ["bt709"], None, moments=False)
    latent = np.frombuffer(row["vae_latent_bytes"], "<f4").reshape(row["vae_latent_shape"])
    assert np.array_equal(latent, posterior.mean[0].numpy())


def test_what_is_not_encoded_is_counted(built):
    report = built[2]
    assert (report.counts.samples, report.counts.clips, report.rejects) == (5, 5, {})
    assert report.warnings["ignored_fields"] == 1
    assert [kind["why"] for kind in report.passed_over["kinds"]] == [
        "images beside a video of the same name are not encoded"
    ]


def test_a_plan_and_the_listing_of_publish_take_the_same_images(built):
    job = built[1]
    plan = forecast_job(job)
    assert (plan.clips, sorted(plan.buckets)) == (5, ["1x32x48", "5x32x32"])
    store = open_store(job.output, job.storage)
    names = [source.uri.rpartition("/")[2] for source in list_inputs(job, store)]
    assert names == ["000.tar", "c.webp", "w.mp4"]
    covered = {source.uri for receipt in receipts(job.output) for source in receipt.shard.objects}
    assert len(covered) == 3
    assert pipeline.encode(job).shards_done == 0, "a second run finds nothing to do"


def test_images_are_encoded_again_from_their_source(built, tmp_path):
    store = open_store(built[1].output, StorageConfig())
    parts = gather(store, None, tmp_path).fresh_parts(store, 8)
    numbers = canary_check(StorageConfig(), clips=8)(store, parts).numbers
    assert (numbers["clips"], numbers["bit_exact"]) == (5, 5)


def test_only_a_job_with_images_names_them_in_its_fingerprint(built):
    parts = receipts(built[1].output)[0].fingerprint_parts
    assert parts["image_decoder"]["pillow"]
    assert parts["clips"]["images"]["policy"] == "keep"


def test_a_build_of_images_alone_fails_unless_they_are_kept(built, tmp_path):
    write_tar(tmp_path / "x.tar", {"a": {"png": picture(9)}})
    job = tiny_job(tmp_path / "x.tar", tmp_path / "out")
    with pytest.raises(NothingEncoded, match=r"no_video 1\).*--images keep.*--allow-empty") as caught:
        pipeline.encode(job)
    assert caught.value.exit_code == 1
    parts = receipts(job.output)[0].fingerprint_parts
    assert "image_decoder" not in parts
    assert "images" not in parts["clips"]
    assert pipeline.encode(job.model_copy(update={"allow_empty": True})).counts.clips == 0
