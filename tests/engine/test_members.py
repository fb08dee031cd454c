"""`members`: paired videos of one sample are cut as its main video, and each is a column; incomplete pairs are rejects."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable
from PIL import Image

import pipeline
from pipeline.config import StorageConfig, build_job
from pipeline.corpus import resolve_inputs
from pipeline.errors import ConfigError, InputError
from pipeline.forecast.survey import forecast_job
from pipeline.format.columns import SCALARS, parquet_schema
from pipeline.format.index import INDEX_SCHEMA
from pipeline.format.stored import OPTIONAL
from pipeline.ledger.candidate import gather
from pipeline.ledger.takedowns import read_takedowns
from pipeline.loader.dataset import LatentDataset
from pipeline.look.canary import canary_check
from pipeline.operate.member_search import mains_of
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.publish_checks import Limits
from pipeline.operate.takedown_names import resolve
from pipeline.operate.verify import verify_output
from pipeline.operate.why import why
from pipeline.reader import read_samples
from pipeline.records import MemberRule, shard_from_dict, stored_shard
from pipeline.records.members import RESERVED
from pipeline.storage import open_store
from tests.tiny_corpus import receipts, rows, tiny_job, video_bytes, write_tar
from tests.video_files import encode

RULE = {"members.control": "depth.mp4", "members.mask": "mask.mp4"}


def half(index: int, width: int, height: int) -> np.ndarray:
    """White on the left, from frame 3 on everywhere."""
    frame = np.full((height * 3 // 2, width), 128, np.uint8)
    frame[:height] = 16
    frame[:height, : width if index >= 3 else width // 2] = 235
    return frame


def mask_bytes(frames: int, size: int = 64) -> bytes:
    return encode(frames, size=(size, size), fps=8, picture=half, options={"preset": "ultrafast", "qp": "0"})


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A whole pair, and pairs that are not: without a member, of other lengths, with a video that no rule names."""
    folder = tmp_path_factory.mktemp("members")
    main, depth, mask = video_bytes(18, seed=1), video_bytes(18, seed=2), mask_bytes(18)
    pair = {"mp4": main, "depth.mp4": depth, "mask.mp4": mask}
    write_tar(
        folder / "000.tar",
        {
            "a": {**pair, "txt": b"words"},
            "alone": {"mp4": main, "mask.mp4": mask},
            "bare": {"mp4": main},
            "long": {**pair, "depth.mp4": video_bytes(17, seed=2)},
            "more": {**pair, "other.webm": main},
            "wide": {**pair, "depth.mp4": video_bytes(18, 64, 96)},
            "orphan": {"depth.mp4": depth},
        },
    )
    write_tar(folder / "depth.tar", {"a": {"mp4": depth}})
    flags = {"clips.variants": "flip", "engine.chunk_frames": "4", "clips.frames": "9", "reject_budget": 1}
    job = tiny_job(folder / "000.tar", folder / "out", "members.video=mp4", **RULE, **flags)
    pipeline.encode(job)
    pipeline.encode(tiny_job(folder / "depth.tar", folder / "apart", **flags))
    return job, folder


@pytest.fixture(scope="module")
def stored(built):
    return rows(built[0].output)


def tensor(row, name):
    return np.frombuffer(row[f"{name}_bytes"], "<f4").reshape(row[f"{name}_shape"])


def test_a_pair_is_one_sample_whose_members_have_columns_of_their_own(built, stored):
    of_a = [row for row in stored.values() if row["source_key"] == "a"]
    assert len(of_a) == 4  # two clips of nine frames in two chunks, mirrored as well
    assert {row["caption"] for row in of_a} == {"words"}
    assert {row["file_name"] for row in of_a} == {"a.mp4"}
    assert {row["source_key"] for row in stored.values()} == {"a", "more"}
    (receipt,) = receipts(built[0].output)
    assert receipt.fingerprint_parts["members"]["others"] == {"control": "depth.mp4", "mask": "mask.mp4"}


def test_a_member_has_the_latent_that_it_would_have_as_a_video_of_its_own(built, stored):
    apart = {(row["clip_index"], row["variant"]): row for row in rows(built[1] / "apart").values()}
    for row in stored.values():
        other = apart[row["clip_index"], row["variant"]]
        np.testing.assert_array_equal(tensor(row, "control"), tensor(other, "vae_latent"))
        assert not np.array_equal(tensor(row, "control"), tensor(row, "vae_latent"))


def test_a_mask_is_its_white_part_of_each_latent_cell(stored):
    first = next(row for row in stored.values() if row["clip_index"] == 0 and row["variant"] == "base")
    mask = tensor(first, "mask")
    assert mask.shape == (1, 3, 4, 4)  # 9 frames of 32x32 by strides of 4 and 8, the first frame by itself
    np.testing.assert_allclose(mask[0, 0], [[1, 1, 0, 0]] * 4, atol=0.02)
    np.testing.assert_allclose(mask[0, 1], [[1, 1, 0.5, 0.5]] * 4, atol=0.02)  # frames 3 and 4 of 1 to 4 are white
    np.testing.assert_allclose(mask[0, 2], 1, atol=0.02)
    mirrored = next(row for row in stored.values() if row["clip_index"] == 0 and row["variant"] == "flip")
    np.testing.assert_array_equal(tensor(mirrored, "mask"), mask[..., ::-1])


def test_videos_that_are_not_encoded_are_rejects_that_name_both(built):
    (receipt,) = receipts(built[0].output)
    found = {(reject.key, reject.reason): reject for reject in receipt.rejects}
    assert set(found) == {
        ("alone", "missing_member"),
        ("bare", "no_members"),
        ("long", "member_mismatch"),
        ("wide", "member_mismatch"),
        ("orphan", "missing_member"),
        ("more.other.webm", "unnamed_video"),
    }
    assert "alone.mp4 has no control (alone.depth.mp4)" in found["alone", "missing_member"].message
    assert "control (long.depth.mp4): 17 frames, the main video has 18" in found["long", "member_mismatch"].message
    assert "another aspect ratio" in found["wide", "member_mismatch"].message
    assert "orphan.depth.mp4" in found["orphan", "missing_member"].message


@pytest.fixture
def folder(tmp_path):
    """A pair of plain files, and a member without a main video."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "a.mp4").write_bytes(video_bytes(18, seed=1))
    (inputs / "a.depth.mp4").write_bytes(video_bytes(18, seed=2))
    (inputs / "b.depth.mp4").write_bytes(video_bytes(18, seed=2))
    return inputs


def test_plain_files_are_members_of_their_main_video(folder, tmp_path, stored):
    flags = {"members.control": "depth.mp4", "clips.frames": "9", "reject_budget": 1}
    job = tiny_job(folder, tmp_path / "out", **flags)
    pipeline.encode(job)
    of_tar = {
        row["clip_index"]: row for row in stored.values() if row["variant"] == "base" and row["source_key"] == "a"
    }
    found = rows(job.output)
    assert {row["source_key"] for row in found.values()} == {"a"}
    for row in found.values():
        np.testing.assert_array_equal(tensor(row, "control"), tensor(of_tar[row["clip_index"]], "control"))
    (reject,) = [reject for receipt in receipts(job.output) for reject in receipt.rejects]
    assert (reject.key, reject.reason) == ("b.depth", "missing_member")
    assert pipeline.encode(job).shards_done == 0

    (folder / "a.depth.mp4").write_bytes(video_bytes(18, seed=3))
    pipeline.encode(job)
    again = rows(job.output)  # with those of the earlier version, which the next snapshot leaves out
    assert again.keys() > found.keys()
    assert len(again) == 2 * len(found)


def test_a_member_is_found_beside_a_main_video_that_is_named_alone(folder):
    job = tiny_job(folder / "a.mp4", folder, **{"members.control": "depth.mp4"})
    (shard,) = resolve_inputs(job.inputs, job.storage, members=job.member_rule)
    (source,) = shard.objects
    assert [member.name for member in source.members] == ["control"]
    assert shard_from_dict(json.loads(json.dumps(stored_shard(dataclasses.asdict(shard))))) == shard
    (sample,) = read_samples(shard, job.storage, max_video_bytes=1 << 30, members=job.member_rule)
    assert [(member.name, member.file_name) for member in sample.members] == [("control", "a.depth.mp4")]


def test_builds_without_members_keep_their_identity(folder):
    with_rule, without = (
        resolve_inputs([str(folder / "a.mp4")], StorageConfig(), members=rule)[0]
        for rule in (MemberRule((("control", "depth.mp4"),)), None)
    )
    assert without.objects[0].version == without.objects[0].etag
    assert with_rule.id("f") != without.id("f")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"latent": "depth.mp4"}, "not columns"),
        ({"Control": "depth.mp4"}, "not columns"),
        ({"control": "depth.txt"}, "expected the suffix of a video"),
        ({"control": "d.mp4", "other": "D.mp4"}, "each needs its own"),
        ({"video": "mp4"}, "at least one member"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(members, message):
    with pytest.raises(ConfigError, match=message):
        build_job({"inputs": ["x.tar"], "output": "out", "members": members})


def test_no_member_has_the_name_of_a_column():
    columns = {*SCALARS, *INDEX_SCHEMA.names, *parquet_schema(moments=True, store=OPTIONAL).names}
    ends = ("bytes", "shape", "dtype", "offset", "length", "hash")
    assert {name.rpartition("_")[0] if name.rpartition("_")[2] in ends else name for name in columns} - {""} <= RESERVED
    assert set(SCALARS) <= RESERVED


@pytest.fixture(scope="module")
def mixed(built):
    """The tar with the same rule and `unpaired: encode`, and a folder: a pair, a video without a member, an image."""
    folder = built[1] / "mixed"
    folder.mkdir()
    (folder / "p.mp4").write_bytes(video_bytes(18, seed=1))
    (folder / "p.depth.mp4").write_bytes(video_bytes(18, seed=2))
    (folder / "p.mask.mp4").write_bytes(mask_bytes(18))
    (folder / "q.mp4").write_bytes(video_bytes(18, seed=4))
    Image.new("RGB", (64, 64), "#8040c0").save(folder / "s.png")
    values = built[0].model_dump() | {
        "inputs": [str(built[1] / "000.tar"), str(folder)],
        "output": str(built[1] / "all"),
    }
    job = build_job(values | {"unpaired": "encode", "images.policy": "keep"})
    pipeline.encode(job)
    return job


def test_unpaired_videos_and_images_are_rows_without_the_columns_of_members(mixed, stored):
    found = rows(mixed.output)
    have = {row["source_key"]: row["control_bytes"] is not None for row in found.values()}
    assert have == {"a": True, "more": True, "p": True, "bare": False, "q": False, "s": False}
    assert all((row["mask_shape"] is None) == (row["control_dtype"] is None) for row in found.values())
    alone = {(row["source_key"], row["clip_index"], row["variant"]): row for row in stored.values()}
    for row in found.values():  # bare.mp4 and a.mp4 are one video
        same = alone.get((row["source_key"].replace("bare", "a"), row["clip_index"], row["variant"]))
        assert same is None or row["vae_latent_bytes"] == same["vae_latent_bytes"]
        for name in ("control_bytes", "mask_bytes") if row["source_key"] in ("a", "more") else ():
            assert row[name] == same[name]
    reasons = Counter(reject.reason for receipt in receipts(mixed.output) for reject in receipt.rejects)
    assert reasons == {"missing_member": 2, "member_mismatch": 2, "unnamed_video": 1}
    assert pipeline.encode(mixed).shards_done == 0


def test_the_plan_of_a_mixed_corpus_counts_members_where_they_are(mixed):
    planned, found = forecast_job(mixed), rows(mixed.output)
    names = ("vae_latent_bytes", "control_bytes", "mask_bytes")
    assert planned.clips == len(found)
    assert planned.latent_bytes == sum(len(row[name] or b"") for row in found.values() for name in names)


def test_a_mixed_output_is_published_checked_and_filtered(mixed, tmp_path):
    store = open_store(mixed.output, StorageConfig())
    parts = gather(store, None, tmp_path).fresh_parts(store, 8)
    numbers = canary_check(StorageConfig(), clips=12)(store, parts).numbers
    assert numbers["clips"] == numbers["bit_exact"] == 12
    publish(store, PublishOptions(limits=Limits(reject_budget=1)))
    found = DeltaTable(f"{mixed.output}/data").to_pyarrow_table().to_pylist()
    assert {row["source_key"] for row in found if row["mask_bytes"] is None} == {"bare", "q", "s"}
    paired = LatentDataset.open(mixed.output, where="control is not null", columns=("control",))
    assert {row.source_key for row in paired} == {"a", "more", "p"}
    assert verify_output(store).ok


def test_a_file_that_is_a_member_stands_for_its_main_video(mixed):
    store, folder = open_store(mixed.output, StorageConfig()), Path(mixed.inputs[1])
    depth, main = str(folder / "p.depth.mp4"), str(folder / "p.mp4")
    assert mains_of(store, [depth, main, str(folder / "q.depth.mp4")]) == {depth: [main]}
    found = why(store, depth, StorageConfig())
    assert (found["state"], found["where"]["uri"]) == ("encoded", main)
    assert resolve(store, [depth], read_takedowns(store)).sources == [depth, main]
    with pytest.raises(InputError, match=r"q\.depth\.mp4"):
        resolve(store, [str(folder / "q.depth.mp4")], read_takedowns(store))


def test_images_beside_paired_videos_need_unpaired_encode():
    options = {"inputs": ["x"], "output": "o", "members.control": "d.mp4"}
    with pytest.raises(ConfigError, match="set unpaired to encode"):
        build_job({**options, "images.policy": "keep"})
    with pytest.raises(ConfigError, match=r"images.policy is only"):
        build_job({**options, "images.policy": "only", "unpaired": "encode"})


def test_unpaired_is_part_of_the_fingerprint_of_a_job_with_members_alone():
    rule = MemberRule((("control", "depth.mp4"),))
    options = {"inputs": ["x"], "output": "o", "unpaired": "encode"}
    encode_all = build_job({**options, "members.control": "depth.mp4"}).member_rule
    assert rule.to_dict() == {"version": 1, "video": "", "others": {"control": "depth.mp4"}}
    assert encode_all.to_dict() == {**rule.to_dict(), "unpaired": True}
    assert MemberRule.of({"members": encode_all.to_dict()}) == encode_all
    assert not build_job(options).member_rule.unpaired


def test_a_decoder_that_crashes_costs_no_row_and_doubles_none(built, stored, tmp_path):
    flags = {"drill.point": "in_decoder", "drill.action": "crash", "drill.marker_dir": str(tmp_path / "m")}
    job = built[0].model_dump() | {"output": str(tmp_path / "out")}
    pipeline.encode(build_job(job | flags))
    assert len(list((tmp_path / "m").iterdir())) == 1
    found = rows(tmp_path / "out")
    assert found.keys() == stored.keys()
    for name, row in stored.items():
        assert all(found[name][f"{each}_bytes"] == row[f"{each}_bytes"] for each in ("vae_latent", "control", "mask"))


def test_a_plan_says_what_the_build_does(built, stored):
    planned = forecast_job(built[0])
    (receipt,) = receipts(built[0].output)
    assert (planned.clips, planned.with_clips) == (len(stored), 2)
    assert {reason: dropped.count for reason, dropped in planned.dropped.items()} == dict(
        Counter(reject.reason for reject in receipt.rejects)
    )
    names = ("vae_latent_bytes", "control_bytes", "mask_bytes")
    written = sum(len(row[name]) for row in stored.values() for name in names)
    assert planned.latent_bytes == written


def test_previews_and_the_canary_find_the_main_video(built, tmp_path):
    store = open_store(built[0].output, StorageConfig())
    numbers = canary_check(StorageConfig(), clips=2)(store, gather(store, None, tmp_path).fresh_parts(store, 8)).numbers
    assert (numbers["clips"], numbers["bit_exact"]) == (2, 2)


def test_the_delta_view_has_the_columns_of_members(built, stored):
    store = open_store(built[0].output, StorageConfig())
    publish(store, PublishOptions(limits=Limits(reject_budget=1)))
    found = {row["id"]: row for row in DeltaTable(f"{built[0].output}/data").to_pyarrow_table().to_pylist()}
    assert found.keys() == stored.keys()
    assert all(found[name]["mask_bytes"] == row["mask_bytes"] for name, row in stored.items())
