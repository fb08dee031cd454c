"""A whole build in one process: rows, counts, resume, new files in a folder, refusals."""

import json
import random

import numpy as np
import pytest
from safetensors.torch import save_file

import model
import pipeline
from pipeline.engine.driver.encode import _weights_notices
from pipeline.engine.driver.executor import Executor
from pipeline.errors import (
    CheckpointDiffers,
    CheckpointError,
    ConfigError,
    InputError,
    NothingEncoded,
    OutputError,
    RejectBudgetExceeded,
)
from pipeline.records import Counts
from tests.tiny_corpus import TINY_NETWORK, make_corpus, receipts, rows, tiny_job, video_bytes, write_tar


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=3, samples=3)


@pytest.fixture(scope="module")
def clean(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("clean") / "out"
    report = pipeline.encode(tiny_job(corpus, output, "engine.decoders=2"))
    return output, report


def test_every_sample_is_encoded_or_rejected_with_a_reason(clean):
    output, report = clean
    assert report.ok
    assert (report.shards_total, report.shards_done, report.shards_before) == (3, 3, 0)
    assert (report.counts.samples, report.counts.encoded, report.counts.rejected) == (9, 6, 3)
    assert report.rejects == {"too_short": 3}
    assert report.counts.damaged == 0
    # 9, 13 and 17 frames give 1, 2 and 3 clips of five; shard s has samples of 9 + 4 * ((s + n) % 3) frames.
    expected = sum((9 + 4 * ((s + n) % 3)) // 5 for s in range(3) for n in range(2))
    assert report.counts.clips == expected == len(rows(output))
    assert report.counts.frames == 5 * expected


def test_rows_name_their_source_and_network(clean):
    output, report = clean
    table = rows(output)
    for row in table.values():
        assert row["vae_latent_shape"] == [4, 2, 4, 4]
        latent = np.frombuffer(row["vae_latent_bytes"], "<f4").reshape(4, 2, 4, 4)
        assert np.isfinite(latent).all()
        assert latent.std() > 0.01
        assert row["caption"] == f"clip {row['source_key']}, größer"
        assert json.loads(row["metadata"])["number"] == int(row["source_key"][3:])
        assert row["fingerprint"] == report.fingerprint
        assert row["source_uri"].endswith(f"{int(row['source_key'][:3]):06d}.tar")
    for receipt in receipts(output):
        receipt.counts.check()
        assert receipt.fingerprint_parts["encoder"]["untrained"]
        assert {reject.reason for reject in receipt.rejects} == {"too_short"}
        assert all(reject.key and reject.message for reject in receipt.rejects)


def test_latents_are_those_of_the_network_on_the_decoded_clip(clean, corpus):
    """Rows against the model called by hand on frames cut by hand: chunking, batching and storage have changed nothing."""
    import torch

    import model
    from pipeline.config import DecodeConfig, DrillConfig
    from pipeline.records import FrameChunk, Sample
    from pipeline.video.clips import resolve_rules
    from pipeline.video.cutting import CutRequest, Cutter

    job = tiny_job(corpus, clean[0])
    vae = model.load("leanvae", config=TINY_NETWORK, untrained=0)
    seed, frames = 1, 13
    cutter = Cutter(
        CutRequest(
            Sample("000001", 1, "u", video_bytes(frames, seed=seed), "mp4"),
            resolve_rules(job.clips, 4, 8, "leanvae"),
            DecodeConfig(),
            1 << 20,
            DrillConfig(),
        )
    )
    cutter.open()
    by_hand = {}
    while isinstance(chunk := cutter.next(), FrameChunk):
        planes = torch.from_numpy(chunk.planes_T3HW[None].copy())
        with torch.inference_mode():
            by_hand[chunk.clip] = vae.encode_planes(planes, [chunk.color_matrix])[0].mean[0].numpy()
    mine = {row["clip_index"]: row for row in rows(clean[0]).values() if row["source_key"] == "000001"}
    assert set(mine) == set(by_hand) == {0, 1}
    for index, row in mine.items():
        stored = np.frombuffer(row["vae_latent_bytes"], "<f4").reshape(row["vae_latent_shape"])
        np.testing.assert_allclose(stored, by_hand[index], atol=1e-5 * max(1, np.abs(by_hand[index]).max()))


def test_the_same_command_again_does_nothing(clean, corpus):
    output, _ = clean
    before = rows(output)
    report = pipeline.encode(tiny_job(corpus, output))
    assert report.ok
    assert (report.shards_done, report.shards_before, report.counts) == (0, 3, Counts())
    assert rows(output) == before


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.batch=1", "engine.chunk_frames=4"),
        ("engine.batch=7", "engine.chunk_frames=64", "engine.decoders=1"),
        ("engine.frame_bytes=16777216", "engine.credit=1"),
    ],
)
def test_batch_and_chunk_change_no_row(corpus, tmp_path, overrides):
    whole = ("clips.select=whole",)
    first = tmp_path / "a"
    pipeline.encode(tiny_job(corpus, first, *whole))
    again = tmp_path / "b"
    pipeline.encode(tiny_job(corpus, again, *whole, *overrides))
    assert_same_rows(rows(first), rows(again))


def assert_same_rows(a, b, atol=1e-5):
    assert set(a) == set(b)
    assert a
    for key, row in a.items():
        other = dict(b[key])
        mine = dict(row)
        x, y = (np.frombuffer(r.pop("vae_latent_bytes"), "<f4") for r in (mine, other))
        np.testing.assert_allclose(x, y, atol=atol * max(1, np.abs(x).max()))
        assert mine == other


def test_a_new_shard_and_a_changed_setting_are_new_work(clean, corpus, tmp_path):
    import shutil

    grown = tmp_path / "corpus"
    shutil.copytree(corpus, grown)
    output = tmp_path / "out"
    assert pipeline.encode(tiny_job(grown, output)).shards_done == 3
    make_corpus(tmp_path / "more", shards=1)
    shutil.copy(tmp_path / "more" / "000000.tar", grown / "000009.tar")
    assert pipeline.encode(tiny_job(grown, output)).shards_done == 1
    other = pipeline.encode(tiny_job(grown, output, "clips.fps=4"))
    assert other.shards_done == 4
    (notice,) = [text for text in other.notices if "encoded before with other settings" in text]
    assert notice.startswith("4 shards of these inputs were encoded before")
    assert ": clips.fps: null -> 4.0. They are encoded again in addition" in notice
    assert f"`lathe publish --fingerprint {other.fingerprint[:8]}` publishes only the new ones" in notice
    assert len({receipt.fingerprint for receipt in receipts(output)}) == 2


def test_a_folder_of_videos_grows_and_only_the_new_files_are_encoded(tmp_path):
    folder, output = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for n in (1, 3, 5):
        (folder / f"{n}.mp4").write_bytes(video_bytes(9, seed=n))
    (folder / "3.txt").write_text("three")
    job = tiny_job(folder, output, "storage.files_per_shard=2")
    first = pipeline.encode(job)
    assert (first.shards_done, first.counts.samples) == (2, 3)
    (folder / "2.mp4").write_bytes(video_bytes(9, seed=2))
    (folder / "0.mp4").write_bytes(b"broken")
    second = pipeline.encode(job)
    assert (second.counts.samples, second.counts.encoded, second.rejects) == (2, 1, {"undecodable": 1})
    assert pipeline.encode(job).shards_done == 0
    table = rows(output)
    assert sorted(row["source_key"] for row in table.values()) == ["1", "2", "3", "5"]
    assert [row["caption"] for row in table.values() if row["source_key"] == "3"] == ["three"]


def test_too_much_damage_stops_the_build_and_keeps_what_is_done(tmp_path):
    content = {f"{n}": {"mp4": video_bytes(9, seed=n) if n % 2 else b"junk"} for n in range(6)}
    write_tar(tmp_path / "a.tar", content)
    with pytest.raises(RejectBudgetExceeded, match="3 of 6 samples are damaged") as caught:
        pipeline.encode(tiny_job(tmp_path / "a.tar", tmp_path / "out"))
    assert caught.value.exit_code == 1
    assert caught.value.report.counts.encoded == 3
    assert len(rows(tmp_path / "out")) == 3
    report = pipeline.encode(tiny_job(tmp_path / "a.tar", tmp_path / "other", "reject_budget=0.5"))
    assert report.rejects == {"undecodable": 3}


@pytest.mark.parametrize("budget", ["0", "0.05", "0.99", "1"])
def test_damage_without_a_sample_counts_as_an_input(tmp_path, budget):
    """Tars of random bytes beside a good video, then without it; a second run judges by the receipts of the first."""
    for n in range(2):
        (tmp_path / f"{n}.tar").write_bytes(random.Random(n).randbytes(20_000))
    write_tar(tmp_path / "good.tar", {"a": {"mp4": video_bytes(5)}})
    beginning = []
    for _ in range(2):
        try:
            pipeline.encode(tiny_job(tmp_path, tmp_path / "out", f"reject_budget={budget}"))
            beginning.append("")
        except RejectBudgetExceeded as error:
            beginning.append(error.message.split(",")[0])
    parts = "(2 of them parts of tars that belong to no sample) are damaged (66.7%)"
    if budget == "0":  # stops at the first
        assert all("(100.0%)" in text or "(66.7%)" in text for text in beginning)
        return
    assert beginning == ([f"2 of 3 inputs {parts}"] * 2 if budget == "0.05" else ["", ""])
    (tmp_path / "good.tar").unlink()
    kind = NothingEncoded if budget == "1" else RejectBudgetExceeded
    with pytest.raises(kind, match="" if budget == "1" else r"2 of 2 inputs .*\(100.0%\)"):
        pipeline.encode(tiny_job(tmp_path, tmp_path / "none", f"reject_budget={budget}"))


def test_non_finite_latents_are_rejected_not_written(tmp_path):
    write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(9)}})
    with pytest.raises(NothingEncoded, match=r"1 sample in, 0 clips out \(non_finite_latent 1\)") as caught:
        pipeline.encode(tiny_job(tmp_path / "a.tar", tmp_path / "out", "write.max_abs=1e-6"))
    assert caught.value.report.rejects == {"non_finite_latent": 1}
    assert caught.value.exit_code == 1
    assert rows(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        (("clips.frames=6",), ConfigError, "5 or 9"),
        (("clips.size=36x32",), ConfigError, "multiple"),
        (("model.name=nonesuch",), ConfigError, "leanvae-dim16"),
        (("model.untrained=null", "model.checkpoint=nowhere.ckpt"), CheckpointError, "nowhere.ckpt"),
        (("model.untrained=null",), CheckpointError, "checkpoint"),
    ],
)
def test_bad_jobs_are_refused_before_anything_starts(corpus, tmp_path, overrides, error, text):
    output = tmp_path / "out"
    with pytest.raises(error, match=text) as caught:
        pipeline.encode(tiny_job(corpus, output, *overrides))
    assert caught.value.exit_code == 2
    assert not list(output.glob("data/**/*"))


def test_a_checkpoint_replaced_after_it_was_identified_is_refused_and_the_next_build_encodes_with_the_new_one(
    corpus, tmp_path, monkeypatch
):
    weights = tmp_path / "w.safetensors"

    def save(seed):
        network = model.load("leanvae", config=TINY_NETWORK, untrained=seed).network
        save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, weights)

    def identified(executor):
        found = real(executor)
        save(1)
        return found

    save(0)
    real, output = Executor.network, tmp_path / "out"
    job = tiny_job(corpus, output, **{"model.untrained": None, "model.checkpoint": str(weights)})
    with monkeypatch.context() as patch:
        patch.setattr(Executor, "network", identified)
        with pytest.raises(
            CheckpointDiffers, match=r"replaced since the build began: latent_weights_sha256 is .*, planned was "
        ):
            pipeline.encode(job)
    assert not receipts(output)
    assert pipeline.encode(job).ok


def test_inputs_without_a_match_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nothing-\*"):
        pipeline.encode(tiny_job(tmp_path / "nothing-*.tar", tmp_path / "out"))


def test_output_of_another_version_or_not_writable_is_refused(corpus, tmp_path):
    other = tmp_path / "out"
    other.mkdir()
    (other / "_latentset.json").write_text(json.dumps({"format": "latentset", "name": "x", "format_version": 99}))
    with pytest.raises(OutputError, match="99"):
        pipeline.encode(tiny_job(corpus, other))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        pipeline.encode(tiny_job(corpus, tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    ("checkpoint", "uri", "beginning"),
    [
        (None, "embedded://mini", "no --checkpoint: using the weights that come with Lathe (mini); they are for demos"),
        (
            "embedded://mini",
            "embedded://mini",
            "--checkpoint embedded://mini: using the weights that come with Lathe (mini)",
        ),
        ("w.ckpt", "w.ckpt", None),
    ],
)
def test_weights_that_come_with_lathe_give_a_notice(checkpoint, uri, beginning):
    found = _weights_notices(checkpoint, "mini", {"untrained": False}, {"uri": uri})
    assert len(found) == (beginning is not None)
    assert not found or found[0].startswith(beginning)
