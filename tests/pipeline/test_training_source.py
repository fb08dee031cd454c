"""Clips of a corpus: the pipeline's own pixels, a pure function of number and seed, from the usable videos."""

from __future__ import annotations

import faulthandler
import gzip
import json
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from model.colour import yuv_to_video
from pipeline.config import DecodeConfig, DrillConfig, StorageConfig, validate
from pipeline.corpus import resolve_inputs
from pipeline.errors import InputError, SourceChanged
from pipeline.records import Bucket, ClipRules, Sample
from pipeline.storage.s3 import S3Store
from pipeline.training import corpus_source, decoder_process
from pipeline.training.corpus_index import corpus_index
from pipeline.training.corpus_source import CorpusSource
from pipeline.training.fetching import Fetcher
from pipeline.training.job import DataConfig
from pipeline.training.random_clip import random_clip
from pipeline.training.unusable import Unusable
from pipeline.video import decode
from pipeline.video.cutting import CutRequest, Cutter
from tests import video_files
from tests.conftest import S3Server
from tests.pipeline.decoded import FAST
from tests.tiny_corpus import video_bytes, write_tar

MiB = 1024 * 1024
SHAKEN = bytes(range(256)) * 8


def open_corpus(
    run: Path, *inputs: object, storage: StorageConfig | None = None, notices: list[str] | None = None, **data
):
    """Source of a job over `inputs`, with its index and its list of unusable samples in `run`."""
    run.mkdir(exist_ok=True)
    storage = storage or StorageConfig()
    config = validate(DataConfig, {"inputs": [str(text) for text in inputs], **data})
    unusable = Unusable(run / "unusable.jsonl")
    shards = resolve_inputs(config.inputs, storage)
    notice = (notices if notices is not None else []).append
    index = corpus_index(shards, run / "index.parquet", storage, DecodeConfig(), unusable, notice)
    return CorpusSource(index, config, DecodeConfig(), storage, unusable)


def numbered(count: int, **settings) -> bytes:
    return video_files.encode(count, options={**FAST, "qp": "4"}, **settings)


def numbers(video_CTHW: torch.Tensor) -> list[int]:
    """Numbers of these frames of a `numbered` video."""
    luma = 16 + video_CTHW.float().mean((0, 2, 3)) * (219 / 255)
    return [round((value - 24) / 13) for value in luma.tolist()]


def encoders_pixels(data: bytes, size: Bucket) -> torch.Tensor:
    """First clip of the video as encoding decodes, scales and colours it; black 0, white 255, not rounded."""
    rules = ClipRules(
        *("head", 0, None, (size.frames,), (size,), None),
        **{"multiple_of": 1, "upscale": False, "min_fps_ratio": 0.9, "time_stride": 1, "space_stride": 1},
    )
    cutter = Cutter(CutRequest(Sample("k", 0, "k.mp4", data, "mp4"), rules, DecodeConfig(), 0, DrillConfig()))
    cutter.open()
    chunk = cutter.next()
    cutter.close()
    video = yuv_to_video(torch.from_numpy(chunk.planes_T3HW)[None], [chunk.color_matrix])
    return (video[0] + 0.5) * 255


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rotation": 90},
        {"hflip": True},
        {"tags": {"color_range": 2, "colorspace": 1}, "pix_fmt": "yuvj420p"},
        {"pix_fmt": "yuv420p10le", "tags": {"colorspace": 9}},
        {"container": "matroska"},
    ],
    ids=["plain", "rotated", "mirrored", "full range", "10 bit", "matroska"],
)
def test_a_clip_has_the_pixels_that_encoding_uses(tmp_path, settings):
    data = video_files.encode(5, size=(64, 64), picture=video_files.textured, options=FAST, **settings)
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": data}})
    source = open_corpus(tmp_path / "run", shard, clips={"scale": [1, 1]})
    for size in (Bucket(5, 32, 32), Bucket(5, 64, 64)):  # as long and as square as the video: nothing is left to chance
        clip = source.clip(0, size.frames, size.height, size.width)
        assert clip.video_CTHW.dtype == torch.uint8
        assert (clip.video_CTHW - encoders_pixels(data, size)).abs().max() < 0.5001, "the nearest of 256 values"
        assert clip.video_CTHW.float().std() > 10, "a picture, not nothing"


def test_moments_are_drawn_on_the_sampling_grid(tmp_path):
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": numbered(16, fps=8)}})
    for fps, step in (("source", 1), (4, 2), (16, 0.5)):
        settings = {"fps": fps, "min_fps_ratio": 0, "scale": [1, 1]}
        source = open_corpus(tmp_path / "run", shard, clips=settings)
        found = [numbers(source.clip(n, 4, 32, 32).video_CTHW) for n in range(12)]
        starts = {clip[0] for clip in found}
        assert len(starts) > 3
        for clip in found:
            offset = 0 if step >= 1 else next(k for k in (0, 1) if (clip[1] == clip[0]) == (k == 0))
            assert clip == [clip[0] + int(step * (k + offset)) for k in range(4)]
    images = {numbers(source.clip(n, 1, 32, 32).video_CTHW)[0] for n in range(24)}
    assert len(images) > 6, "an image is any frame"


def ramp(index: int, width: int, height: int) -> np.ndarray:
    """Luma 40 + x, the same in every row and frame."""
    picture = np.full((height * 3 // 2, width), 128, np.uint8)
    picture[:height] = 40 + np.arange(width)
    return picture


def test_scales_and_positions_are_drawn_within_their_bounds(tmp_path):
    data = video_files.encode(1, size=(64, 128), picture=ramp, options={**FAST, "qp": "2"})
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": data}})

    def slopes_and_places(scale, **clips):
        source = open_corpus(tmp_path / "run", shard, clips={"scale": scale, **clips})
        rows = [source.clip(n, 1, 32, 32).video_CTHW[0, 0].float().mean(0) * (219 / 255) for n in range(24)]
        return [float(row[24] - row[8]) / 16 for row in rows], [float(row[16]) for row in rows]

    covered, places = slopes_and_places([1, 1])
    assert np.allclose(covered, 2, atol=0.15), "64 rows made 32: two columns of the ramp a pixel"
    assert max(places) - min(places) > 30
    assert min(places) > 24 + 32 - 4  # half a clip from the left border
    native, _ = slopes_and_places([4, 4])
    assert np.allclose(native, 1, atol=0.15), "not beyond the video's own size"
    mixed, _ = slopes_and_places([1, 2])
    assert min(mixed) > 0.85
    assert max(mixed) < 2.15
    assert max(mixed) - min(mixed) > 0.5


def small_corpus(folder: Path) -> Path:
    """Two tars and a plain file with six good videos of 6 frames, and three unusable ones."""
    folder.mkdir()
    good = [video_bytes(6, 48, 48, seed) for seed in range(6)]
    write_tar(folder / "0.tar", {f"a{n}": {"mp4": good[n], "txt": b"x"} for n in range(3)})
    bad = {
        "short": {"mp4": video_bytes(3, 48, 48)},
        "broken": {"mp4": SHAKEN},
        "small": {"mp4": video_bytes(6, 16, 16)},
    }
    write_tar(folder / "1.tar", {**bad, **{f"b{n}": {"mp4": good[n]} for n in (3, 4)}, "none": {"txt": b"x"}})
    (folder / "c.mp4").write_bytes(good[5])
    return folder


def keys(source: CorpusSource, count: int, frames: int = 5) -> list[str]:
    return [source.clip(n, frames, 32, 32).key.rpartition("/")[2] for n in range(count)]


def test_every_epoch_visits_every_video_in_its_own_order(tmp_path):
    corpus = small_corpus(tmp_path / "corpus")
    source = open_corpus(tmp_path / "run", corpus, clips={"upscale": True})
    seen = [source.clip(n, 1, 16, 16).key.rpartition("/")[2] for n in range(16)]
    everything = [
        "a0",
        "a1",
        "a2",
        "b3",
        "b4",
        "c.mp4",
        "short",
        "small",
    ]  # one frame of 16 pixels: only one is unusable
    assert len(source) == 9
    for epoch in (source._order(0), source._order(1)):
        assert sorted(epoch) == list(range(9))
    assert set(seen) == set(everything)
    assert list(source._order(0)) != list(source._order(1))
    assert keys(open_corpus(tmp_path / "run", corpus, seed=1), 9) != keys(source, 9)


def test_unusable_videos_are_reported_once_and_replaced_by_the_next(tmp_path):
    corpus = small_corpus(tmp_path / "corpus")
    source = open_corpus(tmp_path / "run", corpus)
    names = [source._index[n].name.rpartition("/")[2] for n in range(9)]
    assert names == ["a0", "a1", "a2", "short", "broken", "small", "b3", "b4", "c.mp4"]
    order = [names[n] for n in source._order(0)]
    good = [name not in ("short", "broken", "small") for name in order]
    expected = [next(order[(n + k) % 9] for k in range(9) if good[(n + k) % 9]) for n in range(9)]
    assert keys(source, 9) == expected
    assert keys(open_corpus(tmp_path / "other", corpus), 9) == expected, "independent of the instance"
    lines = [json.loads(line) for line in (tmp_path / "run" / "unusable.jsonl").read_text().splitlines()]
    assert sorted((line["key"], line["reason"]) for line in lines) == [
        ("broken", "undecodable"),
        ("none", "no_video"),
        ("short", "too_short"),
        ("small", "too_small"),
    ]
    assert keys(source, 18)[:9] == expected
    assert len((tmp_path / "run" / "unusable.jsonl").read_text().splitlines()) == 4


def test_a_video_that_raises_an_unknown_error_is_skipped_and_reported_once(tmp_path, monkeypatch):
    corpus = small_corpus(tmp_path / "corpus")
    first_colour = decode.first_colour

    def failing(*arguments):
        if failing.left:
            failing.left -= 1
            raise ValueError("31 is not a valid Type")
        return first_colour(*arguments)

    failing.left = 1
    monkeypatch.setattr(decode, "first_colour", failing)
    assert len(keys(open_corpus(tmp_path / "run", corpus), 9)) == 9
    lines = [json.loads(line) for line in (tmp_path / "run" / "unusable.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["reason"] == "decoder_fault"]
    assert line["message"].startswith("unexpected ValueError while opening the video: 31 is not a valid Type")


def test_a_video_that_crashes_the_decoder_costs_its_clips_only(tmp_path, monkeypatch):
    """Twice in its process, then it is listed with the signal; later clips, also of other sizes, come from the same source."""
    lengths = {"a": 6, "b": 7, "c": 8}
    videos = {key: {"mp4": numbered(frames)} for key, frames in lengths.items()}
    shard = write_tar(tmp_path / "a.tar", videos)
    deaths = tmp_path / "deaths"

    def crashing(video, *arguments):
        if video == videos["b"]["mp4"]:
            with deaths.open("a") as file:
                file.write("x")
            signal.raise_signal(signal.SIGSEGV)
        return random_clip(video, *arguments)

    monkeypatch.setattr(decoder_process, "random_clip", crashing)
    monkeypatch.setattr(corpus_source, "may_fork", lambda: True)
    faulthandler.disable()  # no traceback of the crash that this test asks for
    source = open_corpus(tmp_path / "run", shard, clips={"scale": [1, 1]})
    try:
        found = [source.clip(n, 5, 32, 32) for n in range(6)]
        again = pickle.loads(pickle.dumps(source)).clip(0, 5, 32, 32)  # noqa: S301
    finally:
        faulthandler.enable()
    assert {clip.key.removeprefix(str(shard)).strip("#:/ ") for clip in found} == {"a", "c"}
    (entry,) = [json.loads(line) for line in (tmp_path / "run" / "unusable.jsonl").read_text().splitlines()]
    assert (entry["key"], entry["reason"]) == ("b", "decoder_crashed")
    assert entry["message"] == "its decoder ended by SIGSEGV, twice; report it with the video"
    assert torch.equal(again.video_CTHW, found[0].video_CTHW)
    assert len(deaths.read_text()) in (2, 4), "once more in the copy if its first clip meets the video"
    monkeypatch.setattr(decoder_process, "random_clip", random_clip)
    monkeypatch.setattr(corpus_source, "may_fork", lambda: False)
    here = open_corpus(tmp_path / "here", shard, clips={"scale": [1, 1]})
    for number, clip in enumerate(found):
        plain = here.clip(number, 5, 32, 32)
        assert plain.key != clip.key or torch.equal(plain.video_CTHW, clip.video_CTHW), (
            "the same pixels as in this process"
        )


def test_a_clip_depends_on_its_number_only(tmp_path):
    corpus = small_corpus(tmp_path / "corpus")
    source = open_corpus(tmp_path / "run", corpus)
    clips = [source.clip(n, 5, 24, 32) for n in range(7)]
    assert not torch.equal(clips[0].video_CTHW, clips[1].video_CTHW)
    elsewhere = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes
    for n in (6, 2, 2, 0, 5):
        again = elsewhere.clip(n, 5, 24, 32)
        assert again.key == clips[n].key
        assert torch.equal(again.video_CTHW, clips[n].video_CTHW)
        assert tuple(again.video_CTHW.shape) == (3, 5, 24, 32)


def test_a_corpus_without_a_usable_clip_is_refused_with_reasons(tmp_path):
    corpus = small_corpus(tmp_path / "corpus")
    source = open_corpus(tmp_path / "run", corpus)
    with pytest.raises(InputError) as caught:
        source.check([(1, 32, 32), (7, 32, 32)])
    message = str(caught.value)
    assert message.startswith(
        "data.inputs: none of 9 videos has a clip of 7 frames of 32x32: too_short (8), undecodable (1)"
    )
    assert caught.value.exit_code == 2
    write_tar(corpus / "empty.tar", {"x": {"txt": b"only words"}})
    with pytest.raises(InputError, match=r"no video in 1 shards: no_video \(1\)"):
        open_corpus(tmp_path / "words", corpus / "empty.tar")


def test_the_index_is_made_once_and_again_when_the_corpus_changes(tmp_path):
    corpus, notices = small_corpus(tmp_path / "corpus"), []
    first = open_corpus(tmp_path / "run", corpus, notices=notices)
    assert notices == ["reading 3 shards once, to index their videos"]
    again = open_corpus(tmp_path / "run", corpus, notices=notices)
    assert len(notices) == 1
    places = [first._index[n] for n in range(9)]
    assert places == [again._index[n] for n in range(9)]
    for place, seed in zip((places[0], places[2], places[6], places[8]), (0, 2, 3, 5), strict=True):
        assert Path(place.source.uri).read_bytes()[place.start :][: place.size] == video_bytes(6, 48, 48, seed)
    write_tar(corpus / "0.tar", {"z": {"mp4": video_bytes(6, 48, 48, 9)}})
    with pytest.raises(SourceChanged):
        keys(again, 9)
    Unusable(tmp_path / "run" / "unusable.jsonl").add("gone.tar", "y", "too_short", "of the corpus that was")
    changed = open_corpus(tmp_path / "run", corpus, notices=notices)
    assert notices[1:] == [
        "the corpus has changed since this run started; the run continues with the new one",
        notices[0],
    ]
    assert len(changed) == 7
    assert Unusable(tmp_path / "run" / "unusable.jsonl").counts() == {"no_video": 1}  # of the new corpus alone


def test_a_compressed_tar_is_refused(tmp_path):
    plain = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(6)}})
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(InputError, match=r"b\.tar\.gz holds 'a' compressed.*unpack it"):
        open_corpus(tmp_path / "run", tmp_path / "b.tar.gz")


@pytest.mark.s3
def test_object_storage_is_read_one_video_at_a_time(tmp_path, moto: S3Server, monkeypatch):
    corpus = small_corpus(tmp_path / "corpus")
    for path in corpus.iterdir():
        moto.client().upload_file(str(path), moto.bucket, path.name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto.secret_key)
    local = open_corpus(tmp_path / "near", corpus)
    far = open_corpus(tmp_path / "far", moto.root, storage=moto.config())
    asked, real = [], S3Store.read_range

    def read_range(self, key, start, length, **options):
        asked.append((key, start, length))
        return real(self, key, start, length, **options)

    monkeypatch.setattr(S3Store, "read_range", read_range)
    for n in range(9):
        assert torch.equal(far.clip(n, 5, 32, 32).video_CTHW, local.clip(n, 5, 32, 32).video_CTHW)
    places = [far._index[n] for n in range(9)]
    assert sorted(asked) == sorted((p.source.uri.rpartition("/")[2], p.start, p.size) for p in places), (
        "each video once"
    )
    asked.clear()
    for n in (0, 1, 0):
        far.clip(n, 5, 32, 32)
    assert asked == [], "all are at hand"
    a0, a1, a2 = places[:3]
    fetcher = Fetcher(moto.config(), cache_bytes=max(a0.size + a1.size, a1.size + a2.size, a0.size + a2.size))
    for place in (a0, a1, a0, a2, a0, a1):
        with fetcher.video(place) as data:
            assert data == (corpus / "0.tar").read_bytes()[place.start :][: place.size]
    assert [start for _, start, _ in asked] == [a0.start, a1.start, a2.start, a1.start], (
        "the cache holds two: the oldest is dropped"
    )


def test_the_unusable_list_survives_a_process_killed_while_writing(tmp_path):
    path = tmp_path / "unusable.jsonl"
    one, other = Unusable(path), Unusable(path)
    one.add("a.tar", "k", "too_short", "3 frames")
    other.add("a.tar", "k", "too_short", "3 frames")
    with path.open("ab") as file:
        file.write(b'{"uri": "a.tar", "ke')
    other.add("a.tar", "l", "too_small", "8 pixels")
    one.add("a.tar", "l", "too_small", "8 pixels")
    assert Unusable(path).counts() == one.counts() == {"too_short": 1, "too_small": 1}
    assert len(path.read_text().splitlines()) == 3


def test_a_damaged_end_rejects_only_clips_that_need_it(tmp_path):
    options = {"options": {**FAST, "g": "8"}, "container_options": {"movflags": "faststart"}}
    data = video_files.encode(40, picture=video_files.textured, **options)
    whole = len(data) * 6 // 10
    broken = data[:whole] + bytes(len(data) - whole)
    shard = write_tar(tmp_path / "a.tar", {"broken": {"mp4": broken}, "whole": {"mp4": video_bytes(2)}})
    source = open_corpus(tmp_path / "run", shard)
    found = [source.clip(n, 2, 32, 32).key.rpartition("/")[2] for n in range(30)]
    assert found == [
        open_corpus(tmp_path / "other", shard).clip(n, 2, 32, 32).key.rpartition("/")[2] for n in range(30)
    ]
    assert 0 < found.count("broken") < 15
    assert source._unusable.counts() == {"corrupt_stream": 1}


def test_a_large_video_is_spooled_to_a_file(tmp_path):
    data = bytes(range(256)) * 5000
    write_tar(tmp_path / "a.tar", {"a": {"mp4": data}})
    source = open_corpus(tmp_path / "run", tmp_path / "a.tar", storage=StorageConfig(spool_bytes=MiB))
    with source._fetcher.video(source._index[0]) as path:
        assert Path(path).read_bytes() == data
    assert not Path(path).exists()
