"""`write.store`: conditions and first frames of a build are those of the frames that the latents were made of, in every variant."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

import model
import pipeline
from model.colour import yuv_to_video
from pipeline.config import StorageConfig
from pipeline.encoder import identify
from pipeline.engine.worker.build_context import make_context
from pipeline.forecast.survey import forecast_job
from pipeline.format.index import read_index
from pipeline.ledger.candidate import gather
from pipeline.look.canary import canary_check
from pipeline.look.preview import preview
from pipeline.look.stored import choose, facts, in_turns
from pipeline.operate.inspect import inspect_path
from pipeline.operate.verify import verify_output
from pipeline.records import Sample, stable_hash
from pipeline.storage import open_store
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.first_frame import WEBP_SIDE, lossless_image, rgb_of
from tests.pipeline.test_cutting import by_clip, planes_of
from tests.tiny_corpus import TINY_NETWORK, receipts, rows, tiny_job, video_bytes, write_tar

BOTH = "first_frame,i2v_cond"


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two whole videos, mirrored as well, in chunks of four frames: the zeros of the longer one repeat."""
    folder = tmp_path_factory.mktemp("stored")
    videos = {"long": video_bytes(61, seed=1), "short": video_bytes(5, seed=2)}
    write_tar(folder / "000.tar", {key: {"mp4": data} for key, data in videos.items()})
    flags = {"clips.select": "whole", "clips.variants": "flip", "engine.chunk_frames": "4", "write.store": BOTH}
    job = tiny_job(folder / "000.tar", folder / "out", **flags)
    pipeline.encode(job)
    return job, videos


@pytest.fixture(scope="module")
def stored(built):
    return rows(built[0].output)


@pytest.fixture(scope="module")
def network():
    return model.load("leanvae", config=TINY_NETWORK, untrained=0)


def frames_of(job, key, data):
    """Planes of the whole video as the network gets them, before mirroring; and the colour matrix."""
    rules = dataclasses.replace(resolve_rules(job.clips, 4, 8, "leanvae", 1), flip=False)
    cutter = Cutter(CutRequest(Sample(key, 0, "a.tar", data, "mp4"), rules, job.decode, 0, job.drill))
    opened = cutter.open()
    chunk = cutter.next()
    cutter.close()
    return planes_of(by_clip([chunk])[0]), opened.info.color_matrix


def of_frame_and_zeros(network, planes, matrix):
    """The condition encoded in one piece."""
    video = yuv_to_video(torch.from_numpy(np.ascontiguousarray(planes))[None], [matrix], network.spec.value_range)
    video[:, :, 1:] = 0
    with torch.inference_mode():
        return network.encode(video)[0].mean[0].numpy()


def test_rows_hold_the_latent_of_the_first_frame_and_zeros_bit_for_bit(built, stored, network):
    job, videos = built
    assert len(stored) == 4
    for row in stored.values():
        planes, matrix = frames_of(job, row["source_key"], videos[row["source_key"]])
        planes = planes[..., ::-1] if row["variant"] == "flip" else planes
        cond = np.frombuffer(row["i2v_cond_bytes"], "<f4").reshape(row["i2v_cond_shape"])
        assert row["i2v_cond_shape"] == row["vae_latent_shape"]
        assert row["i2v_cond_dtype"] == "float32"
        np.testing.assert_array_equal(cond, of_frame_and_zeros(network, planes, matrix))
        latent = np.frombuffer(row["vae_latent_bytes"], "<f4").reshape(row["vae_latent_shape"])
        np.testing.assert_array_equal(cond[:, 0], latent[:, 0])
        assert not np.array_equal(cond[:, 1], latent[:, 1])


def test_first_frames_are_the_pixels_that_the_network_sees(built, stored):
    job, videos = built
    for row in stored.values():
        planes, matrix = frames_of(job, row["source_key"], videos[row["source_key"]])
        seen = yuv_to_video(torch.from_numpy(planes[None, :1].copy()), [matrix], (0.0, 255.0)).round()[0, :, 0]
        seen_HW3 = seen.permute(1, 2, 0).to(torch.uint8).numpy()
        with Image.open(io.BytesIO(row["first_frame"])) as picture:
            assert (picture.format, picture.mode) == ("WEBP", "RGB")
            shown = np.asarray(picture)
        np.testing.assert_array_equal(shown, seen_HW3[:, ::-1] if row["variant"] == "flip" else seen_HW3)


@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020nc"])
def test_pixels_are_converted_as_the_network_does(matrix):
    planes = np.random.default_rng(0).integers(0, 256, (3, 256, 256), np.uint8)
    seen = yuv_to_video(torch.from_numpy(planes[None, None]), [matrix], (0.0, 255.0), torch.float64)
    difference = np.abs(seen[0, :, 0].permute(1, 2, 0).numpy() - rgb_of(planes, matrix).astype(float))
    assert difference.max() <= 0.5 + 1e-4


def test_sides_beyond_webp_are_png():
    planes = np.full((3, 2, WEBP_SIDE + 1), 90, np.uint8)
    with Image.open(io.BytesIO(lossless_image(planes, "bt709"))) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), rgb_of(planes, "bt709"))


def test_only_jobs_that_store_more_have_another_fingerprint(built):
    job, _ = built
    (receipt,) = receipts(job.output)
    assert receipt.fingerprint_parts["store"] == {"first_frame": 1, "i2v_cond": 1}
    plain = job.model_copy(update={"write": job.write.model_copy(update={"store": ()})})
    network, rules = identify(job.model), resolve_rules(job.clips, 4, 8, "leanvae", 1)
    made = [make_context(each, rules, network, "cpu", "float32") for each in (job, plain)]
    parts = {name: part for name, part in receipt.fingerprint_parts.items() if name != "store"}
    assert [context.fingerprint for context in made] == [receipt.fingerprint, stable_hash(parts)]


def test_readers_of_an_output_know_what_it_stores(built, stored):
    job, _ = built
    store = open_store(job.output, StorageConfig())
    assert verify_output(store, deep=True).ok
    (receipt,) = receipts(job.output)
    described = inspect_path(store.uri(receipt.files[0].key), StorageConfig())
    assert described["metadata"]["latent"]["store"] == ["first_frame", "i2v_cond"]
    for found in in_turns(store, choose(store).receipts):
        assert facts(store, found)["source_key"] in ("long", "short")
    sizes = sum(len(row["vae_latent_bytes"]) + len(row["i2v_cond_bytes"]) for row in stored.values())
    assert forecast_job(job).latent_bytes == sizes


def test_previews_and_the_canary_read_the_latents_beside_them(built, tmp_path):
    job, _ = built
    store = open_store(job.output, StorageConfig())
    numbers = canary_check(StorageConfig(), clips=4)(store, gather(store, None, tmp_path).fresh_parts(store, 8)).numbers
    assert (numbers["clips"], numbers["bit_exact"]) == (4, 4)
    assert len(preview(job.output, StorageConfig(), sheet=str(tmp_path / "sheet.png"), clips=2)["clips"]) == 2


@pytest.mark.parametrize("name", ["i2v_cond", "first_frame"])
def test_verify_finds_damage(built, tmp_path, name):
    job, _ = built
    store = open_store(job.output, StorageConfig())
    (receipt,) = receipts(job.output)
    item = receipt.files[0]
    row = read_index(store.read(item.index_key))[0][0]
    (place,) = [place for place in row.others if place.name == name]
    data = store.read(item.key)
    changed = bytearray(data)
    changed[place.offset + place.length // 2] ^= 1
    store.write(item.key, bytes(changed))
    try:
        problems = verify_output(store, deep=True).problems
    finally:
        store.write(item.key, data)
    assert f"{item.key}#{row.id}" in [problem.file for problem in problems]
