"""The sample corpus: varied, reproducible, readable as WebDataset; with one truncated file and known rejects."""

from __future__ import annotations

import hashlib
import json
import tarfile
import time
from pathlib import Path

import pytest

from pipeline import sample_corpus
from pipeline.config import DecodeConfig, build_job, validate
from pipeline.errors import OutputError
from pipeline.forecast.survey import forecast_job
from pipeline.records import Reject, Sample
from pipeline.sample_corpus import RECIPES, SampleSummary, make_samples


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SampleSummary, float]:
    folder = tmp_path_factory.mktemp("samples")
    started = time.process_time()
    summary = make_samples(str(folder))
    return folder, summary, time.process_time() - started


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ext = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                assert member.mtime == sample_corpus.MTIME
                found.setdefault(key, {})[ext] = file.read()
    return found


def items(folder: Path) -> list[Sample | Reject]:
    result: list[Sample | Reject] = []
    for index, (key, fields) in enumerate(members(folder).items()):
        videos = [(ext, data) for ext, data in fields.items() if ext not in ("txt", "json")]
        if videos:
            result.append(Sample(key, index, "uri", videos[0][1], videos[0][0], fields["txt"].decode()))
        else:
            result.append(Reject(key, "read", "no_video", "", policy=True))
    return result


def test_the_corpus_is_small_and_has_two_shards(corpus):
    folder, summary, seconds = corpus
    assert summary.files == ("000000.tar", "000001.tar")
    assert summary.num_bytes == sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    assert (summary.samples, summary.videos, summary.damaged) == (20, 19, 1)
    assert f"{summary.samples} samples" in str(summary)
    assert json.loads(json.dumps(summary.to_dict()))["frames"] == summary.frames
    assert seconds < 60  # 12 s on an idle core


def test_every_sample_has_a_caption_and_all_but_one_a_video(corpus):
    found = members(corpus[0])
    assert list(found) == [f"{index:06d}" for index in range(20)]
    without = [key for key, fields in found.items() if set(fields) == {"txt", "json"}]
    assert without == ["000007"]
    for fields, recipe in zip(found.values(), RECIPES, strict=True):
        assert fields["txt"].decode() == recipe.caption
        assert json.loads(fields["json"])["caption"] == recipe.caption
    assert json.loads(found["000007"]["json"])["status"] == "failed_to_download"


def test_a_default_job_encodes_sixteen_and_rejects_the_others_with_reasons(corpus):
    plan = forecast_job(build_job({"inputs": [str(corpus[0])], "output": "."}))
    assert (plan.samples, plan.with_clips) == (20, 16)
    assert {reason: (d.count, d.policy, d.keys) for reason, d in plan.dropped.items()} == {
        "no_video": (1, True, ["000007"]),
        "undecodable": (1, False, ["000009"]),
        "too_small": (1, True, ["000015"]),
        "too_short": (1, True, ["000019"]),
    }


def test_codecs_sizes_and_rates_vary(corpus):
    from pipeline.video.decode import open_video

    infos = []
    for item in items(corpus[0]):
        if isinstance(item, Sample) and item.key != "000009":
            infos.append(open_video(item.video, validate(DecodeConfig, {})).info)
    assert {info.codec for info in infos} == {"h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg"}
    assert {round(info.fps) for info in infos} >= {8, 12, 24, 25, 30, 60}
    assert {info.rotation for info in infos} == {0, 90}
    assert {"yuv420p10le", "yuvj420p", "yuv420p"} <= {info.pixel_format for info in infos}
    assert {info.color_range for info in infos} >= {"limited", "full"}
    assert any(info.width % 2 and info.height % 2 for info in infos)
    assert any(info.height > info.width for info in infos)
    assert all(info.color_matrix == ("bt601" if info.codec in ("mjpeg", "mpeg4") else "bt709") for info in infos)


def test_the_seed_decides_the_bytes(corpus):
    found = members(corpus[0])
    for index in (2, 3, 6, 12, 13, 15):  # VP9, AV1, MPEG-4, variable rate, HEVC, H.264
        fields = sample_corpus._sample(index, RECIPES[index], 0)
        assert fields[RECIPES[index].ext] == found[f"{index:06d}"][RECIPES[index].ext]
    other = sample_corpus._sample(15, RECIPES[15], 1)
    assert other["mp4"] != found["000015"]["mp4"]


def test_tars_are_reproducible_to_the_byte(monkeypatch, tmp_path):
    monkeypatch.setattr(sample_corpus, "RECIPES", (RECIPES[15], RECIPES[7], RECIPES[19]))
    digests = set()
    for name in ("a", "b"):
        summary = make_samples(str(tmp_path / name), shards=1)
        digests.add(hashlib.sha256((tmp_path / name / summary.files[0]).read_bytes()).hexdigest())
        time.sleep(1.1)  # tar headers count whole seconds
    assert len(digests) == 1


def test_plain_files_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(sample_corpus, "RECIPES", (RECIPES[15], RECIPES[7], RECIPES[19]))
    summary = make_samples(str(tmp_path / "files"), layout="files")
    assert summary.files == ("000000.json", "000000.mp4", "000000.txt", "000002.json", "000002.mp4", "000002.txt")
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == list(summary.files)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the sample corpus"):
        make_samples(str(tmp_path / "file" / "below"))


def test_an_impossible_number_of_shards_is_refused():
    with pytest.raises(ValueError, match="expected 1 to 20, got 0"):
        make_samples("/nonexistent", shards=0)


def test_a_folder_that_is_not_empty_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "000000.tar").write_bytes(b"of the user")
    for layout in ("tar", "files"):
        with pytest.raises(OutputError, match=r"is not empty, it holds 000000\.tar; name a new folder"):
            make_samples(str(tmp_path), layout=layout)  # type: ignore[arg-type]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("000000.tar", b"of the user")]
