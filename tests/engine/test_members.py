"""`members`: paired videos of one sample are cut as its main video, and each is a column; incomplete pairs are rejects."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import pipeline
from pipeline.config import StorageConfig, build_job
from pipeline.corpus import resolve_inputs
from pipeline.errors import ConfigError
from pipeline.format.columns import SCALARS, parquet_schema
from pipeline.format.index import INDEX_SCHEMA
from pipeline.format.stored import OPTIONAL
from pipeline.reader import read_samples
from pipeline.records import MemberRule, shard_from_dict, stored_shard
from pipeline.records.members import RESERVED
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


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A whole pair, and pairs that are not: without a member, of other lengths, with a video that no rule names."""
    folder = tmp_path_factory.mktemp("members")
    main, depth, mask = video_bytes(13, seed=1), video_bytes(13, seed=2), mask_bytes(13)
    pair = {"mp4": main, "depth.mp4": depth, "mask.mp4": mask}
    write_tar(
        folder / "000.tar",
        {
            "a": {**pair, "txt": b"words"},
            "alone": {"mp4": main, "mask.mp4": mask},
            "long": {**pair, "depth.mp4": video_bytes(12, seed=2)},
            "more": {**pair, "other.webm": main},
            "wide": {**pair, "depth.mp4": video_bytes(13, 64, 96)},
            "orphan": {"depth.mp4": depth},
        },
    )
    write_tar(folder / "depth.tar", {"a": {"mp4": depth}})
    flags = {"clips.variants": "flip", "engine.chunk_frames": "4", "reject_budget": 1}
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
    assert len(of_a) == 4  # two clips of five frames, mirrored as well
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
    assert mask.shape == (1, 2, 4, 4)  # 5 frames of 32x32 by strides of 4 and 8, the first frame by itself
    np.testing.assert_allclose(mask[0, 0], [[1, 1, 0, 0]] * 4, atol=0.02)
    np.testing.assert_allclose(mask[0, 1], [[1, 1, 0.5, 0.5]] * 4, atol=0.02)  # frames 3 and 4 of 1 to 4 are white
    mirrored = next(row for row in stored.values() if row["clip_index"] == 0 and row["variant"] == "flip")
    np.testing.assert_array_equal(tensor(mirrored, "mask"), mask[..., ::-1])


def test_videos_that_are_not_encoded_are_rejects_that_name_both(built):
    (receipt,) = receipts(built[0].output)
    found = {(reject.key, reject.reason): reject for reject in receipt.rejects}
    assert set(found) == {
        ("alone", "missing_member"),
        ("long", "member_mismatch"),
        ("wide", "member_mismatch"),
        ("orphan", "missing_member"),
        ("more.other.webm", "unnamed_video"),
    }
    assert "alone.mp4 has no control (alone.depth.mp4)" in found["alone", "missing_member"].message
    assert "control (long.depth.mp4): 12 frames, the main video has 13" in found["long", "member_mismatch"].message
    assert "another aspect ratio" in found["wide", "member_mismatch"].message
    assert "orphan.depth.mp4" in found["orphan", "missing_member"].message


@pytest.fixture
def folder(tmp_path):
    """A pair of plain files, and a member without a main video."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "a.mp4").write_bytes(video_bytes(13, seed=1))
    (inputs / "a.depth.mp4").write_bytes(video_bytes(13, seed=2))
    (inputs / "b.depth.mp4").write_bytes(video_bytes(13, seed=2))
    return inputs


def test_plain_files_are_members_of_their_main_video(folder, tmp_path, stored):
    job = tiny_job(folder, tmp_path / "out", **{"members.control": "depth.mp4", "reject_budget": 1})
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

    (folder / "a.depth.mp4").write_bytes(video_bytes(13, seed=3))
    pipeline.encode(job)
    counted = {row["id"]: row for row in rows(job.output).values()}
    assert len(counted) == 2 * len(found)  # the old version as well, until it is published without


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


def test_members_are_of_videos():
    with pytest.raises(ConfigError, match="build of their own"):
        build_job({"inputs": ["x"], "output": "o", "members.control": "d.mp4", "images.policy": "keep"})
