"""Odd inputs in a folder, in a tar and on S3, in a plan, and in a build. On Ray: `test_ray_odd_inputs`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline
from pipeline.config import StorageConfig
from pipeline.corpus import media_kind, resolve_inputs
from pipeline.errors import BadDataError
from pipeline.reader import read_samples
from pipeline.records import Reject, Sample
from pipeline.storage import open_store
from tests import forked_command
from tests.odd_inputs import archives
from tests.odd_inputs.cutting import cut, rules
from tests.odd_inputs.table import ALL, DAMAGED, Odd
from tests.tiny_corpus import TINY_NETWORK, receipts, tiny_job

BY_NAME = {odd.name: odd for odd in ALL if media_kind(odd.file_name) == "video"}
STORAGE = StorageConfig()


def outcome(video: bytes | str) -> str:
    """Result of a video: hashes of its clips' pixels and its rejects, or the reason of its own reject."""
    try:
        found = cut(video, rules("tile"))
    except BadDataError as error:
        return error.reason
    digest = hashlib.blake2b(digest_size=8)
    for clip, frames in sorted(found.clips.items()):
        for time_s, planes in frames:
            digest.update(f"{clip} {time_s}".encode() + planes.tobytes())
    return f"{digest.hexdigest()} {[(reject.clip, reject.reason) for reject in found.failed]}"


outcome_of_bytes = functools.cache(outcome)  # the same bytes are decoded once; files are decoded where they lie


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Result of each file, decoded from bytes."""
    return {name: outcome_of_bytes(odd.data()) if odd.data() else "empty_video" for name, odd in BY_NAME.items()}


def write_folder(folder: Path, odds: list[Odd]) -> Path:
    folder.mkdir(exist_ok=True)
    for odd in odds:
        (folder / odd.file_name).write_bytes(odd.data())
    return folder


def in_folder(tmp_path: Path, s3: Callable[[], str]) -> list[str]:
    return [str(write_folder(tmp_path / "videos", list(BY_NAME.values())))]


def in_tar(tmp_path: Path, s3: Callable[[], str]) -> list[str]:
    path = tmp_path / "videos.tar"
    path.write_bytes(archives.tar((odd.file_name, odd.data()) for odd in BY_NAME.values()))
    return [str(path)]


def on_s3(tmp_path: Path, s3: Callable[[], str]) -> list[str]:
    """Every fourth file as a plain file, the others in a tar."""
    root = s3()
    store = open_store(root, STORAGE)
    odds = list(BY_NAME.values())
    for path in write_folder(tmp_path / "some", odds[::4]).iterdir():
        store.upload(path, f"files/{path.name}")
    path = tmp_path / "rest.tar"
    path.write_bytes(archives.tar((odd.file_name, odd.data()) for n, odd in enumerate(odds) if n % 4))
    store.upload(path, "rest.tar")
    return [f"{root}/files", f"{root}/rest.tar"]


@pytest.mark.parametrize(
    "place", [in_folder, in_tar, pytest.param(on_s3, marks=pytest.mark.s3)], ids=lambda p: p.__name__
)
def test_a_file_gives_the_same_in_a_folder_a_tar_and_a_bucket(place, tmp_path, request, outcomes):
    inputs = place(tmp_path, lambda: request.getfixturevalue("s3").root)
    found = {}
    for shard in resolve_inputs(inputs, STORAGE):
        for item in read_samples(shard, STORAGE, max_video_bytes=1 << 30):
            assert item.key not in found
            if isinstance(item, Reject):
                found[item.key] = item.reason
            else:
                found[item.key] = outcome(item.video) if isinstance(item.video, str) else outcome_of_bytes(item.video)
    assert found == outcomes


# --- tars with odd names and contents ---------------------------------------------------------------------------------


def read_tar(tmp_path: Path, data: bytes) -> list[Sample | Reject]:
    path = tmp_path / "odd.tar"
    path.write_bytes(data)
    (shard,) = resolve_inputs([str(path)], STORAGE)
    return list(read_samples(shard, STORAGE, max_video_bytes=1 << 30))


def test_names_with_dots_give_a_sample_each_with_its_own_caption(tmp_path):
    items = read_tar(tmp_path, archives.dotted())
    assert {item.caption for item in items if isinstance(item, Sample)} == {f"caption of {n}" for n in archives.DOTTED}
    assert len(items) == len({item.key for item in items}) == len(archives.DOTTED)


@pytest.mark.parametrize(
    ("make", "videos"), [(archives.same_key, 3), (archives.same_key_apart, 3), (archives.two_videos_of_a_key, 2)]
)
def test_every_video_of_a_tar_is_a_sample_or_a_reject(make, videos, tmp_path):
    items = read_tar(tmp_path, make())
    assert len(items) == videos
    captions = {item.key: item.caption for item in items if isinstance(item, Sample)}
    assert captions["k"] in ("first", "words")
    assert all(item.reason and item.message for item in items if isinstance(item, Reject))


def test_captions_are_text_or_missing_but_never_damaged(tmp_path):
    found = {item.key: item.caption for item in read_tar(tmp_path, archives.captions())}
    assert found.keys() == archives.ENCODED_CAPTIONS.keys()
    assert not [caption for caption in found.values() if caption and ("\ufffd" in caption or "\0" in caption)]
    assert (found["utf8"], found["bom"], found["nul"]) == ("größer", "größer", "a dog running")
    assert found["utf16"] == found["utf16be"] == found["cp1252"] == archives.CAPTION
    assert found["gbk"] in (None, archives.ENCODED_CAPTIONS["gbk"].decode("gbk"))
    assert found["sjis"] in (None, archives.ENCODED_CAPTIONS["sjis"].decode("shift_jis"))


# --- plan and builds --------------------------------------------------------------------------------------------------


def plan_of(folder: Path) -> dict:
    """`lathe plan --json`."""
    size = ("--model", "leanvae", "--frames", "5", "--size", "32x32", "--clips", "uniform:2")
    run = forked_command.run("plan", folder, *size, "--json", "--set", f"model.config={json.dumps(TINY_NETWORK)}")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_build_does_what_plan_predicts(tmp_path):
    """`plan` decodes one frame of each video, so it cannot find damage inside a stream. Clips of such videos may fail."""
    damaged = {odd.name for odd in DAMAGED}
    planned, built = {}, {}
    for part, odds in (
        ("sound", [odd for name, odd in BY_NAME.items() if name not in damaged]),
        ("damaged", [odd for name, odd in BY_NAME.items() if name in damaged]),
    ):
        folder = write_folder(tmp_path / part, odds)
        planned[part] = plan_of(folder)
        job = tiny_job(folder, tmp_path / f"{part}-out", **{"clips.select": "uniform:2", "reject_budget": 1})
        built[part] = pipeline.encode(job)
    for part, report in built.items():
        assert report.counts.samples == planned[part]["samples"]
        assert report.counts.clips_planned == planned[part]["clips"]
    counts = built["sound"].counts
    dropped = {reason: item["count"] for reason, item in planned["sound"]["dropped"].items()}
    assert dropped == built["sound"].rejects
    assert (counts.encoded, counts.rejected) == (planned["sound"]["with_clips"], planned["sound"]["without_clips"])
    assert (counts.clips, counts.clips_rejected) == (planned["sound"]["clips"], 0)
    rejects = Counter(r.reason for receipt in receipts(tmp_path / "damaged-out") for r in receipt.rejects)
    assert rejects == Counter(built["damaged"].rejects)
