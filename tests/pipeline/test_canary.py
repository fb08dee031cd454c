"""The canary check on real videos and a tiny network: what passes, and each way to fail."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pipeline
from model.interface import LatentSpec
from pipeline.cli.app import app
from pipeline.config import StorageConfig
from pipeline.ledger.candidate import gather
from pipeline.ledger.receipts import Ledger
from pipeline.look import canary
from pipeline.look.canary import canary_check
from pipeline.look.showing import LatentDecoder
from pipeline.storage import open_store
from tests.tiny_corpus import TINY_NETWORK, tiny_job, video_bytes

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two videos of 21 frames in clips of 21: three chunks each."""
    folder = tmp_path_factory.mktemp("canary")
    (folder / "corpus").mkdir()
    for seed, key in enumerate("ab"):
        (folder / "corpus" / f"{key}.mp4").write_bytes(video_bytes(21, seed=seed))
    made = tiny_job(folder / "corpus", folder / "out", **{"clips.frames": "21"})
    pipeline.encode(made)
    return made


@pytest.fixture(scope="module")
def parts(job, tmp_path_factory):
    store = open_store(job.output, StorageConfig())
    return store, gather(store, None, tmp_path_factory.mktemp("gathered")).fresh_parts(store, 8)


def test_stored_clips_encode_to_the_same_bits_on_this_machine(parts) -> None:
    check = canary_check(StorageConfig())(*parts)
    assert (check.ok, check.judged, check.message) == (True, True, "")
    numbers = check.numbers
    assert (numbers["clips"], numbers["bit_exact"], numbers["same_machine"], numbers["chunked_differs"]) == (2, 2, 2, 0)
    assert numbers["chunked"] == 2
    assert numbers["psnr"] > 0
    assert -1 <= numbers["ssim"] <= 1
    assert (numbers["psnr_floor"], numbers["ssim_floor"]) == (None, None)  # of untrained weights


def test_clips_are_encoded_again_with_the_threads_that_made_them(parts, monkeypatch, request) -> None:
    used = []

    def encode(encode, *rest):
        used.append(torch.get_num_threads())
        return encode(*rest)

    with_encoder(monkeypatch, encode)
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    check = canary_check(StorageConfig())(*parts)
    assert set(used) == {1}
    assert torch.get_num_threads() == 2
    assert (check.ok, check.numbers["same_machine"]) == (True, 2)


def with_encoder(monkeypatch, change) -> None:
    """Puts another encoder in: `change` of the planes and the state."""
    plain = LatentDecoder.__init__

    def init(self, *arguments) -> None:
        plain(self, *arguments)
        encode = self.vae.encode_planes
        self.vae.encode_planes = lambda planes, matrices, state, moments: change(
            functools.partial(encode, moments=moments), planes, matrices, state
        )

    monkeypatch.setattr(LatentDecoder, "__init__", init)


def test_an_encoder_that_gives_other_bits_fails(parts, monkeypatch) -> None:
    with_encoder(monkeypatch, lambda encode, planes, *rest: encode(255 - planes, *rest))
    check = canary_check(StorageConfig())(*parts)
    assert not check.ok
    assert "2 of 2 clips, encoded again on a machine of the kind that made them, differ" in check.message


def test_an_encoder_that_forgets_its_state_fails(parts, monkeypatch) -> None:
    def forget(encode, planes, matrices, state):
        if state is None:
            return encode(planes, matrices, None)
        posterior, after = encode(planes, matrices, state)
        return replace(posterior, mean=posterior.mean + 1), after

    with_encoder(monkeypatch, forget)
    check = canary_check(StorageConfig())(*parts)
    assert "2 of 2 clips encode to other latents in chunks than whole" in check.message


@pytest.fixture(scope="module")
def with_moments(tmp_path_factory):
    """As `parts`, of one video, with log-variances and conditions, in a tar."""
    folder = tmp_path_factory.mktemp("moments")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.mp4").write_bytes(video_bytes(21, seed=7))
    pipeline.encode(
        tiny_job(
            folder / "corpus",
            folder / "out",
            **{"clips.frames": "21", "write.moments": True, "write.format": "tar", "write.dtype": "bfloat16"},
            **{"write.store": "i2v_cond"},
        )
    )
    store = open_store(str(folder / "out"), StorageConfig())
    return store, gather(store, None, tmp_path_factory.mktemp("gathered")).fresh_parts(store, 8)


@pytest.fixture(scope="module")
def as_int8(tmp_path_factory):
    """As `parts`, of one video, as int8 and compressed."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.mp4").write_bytes(video_bytes(21, seed=7))
    flags = {"clips.frames": "21", "write.dtype": "int8", "write.compression": "zstd"}
    pipeline.encode(tiny_job(folder / "corpus", folder / "out", **flags))
    store = open_store(str(folder / "out"), StorageConfig())
    return store, gather(store, None, tmp_path_factory.mktemp("gathered")).fresh_parts(store, 8)


def test_int8_clips_encode_to_the_same_levels_here_and_within_half_a_step_elsewhere(as_int8, monkeypatch) -> None:
    found = canary_check(StorageConfig())(*as_int8)
    assert (found.ok, found.numbers["clips"], found.numbers["bit_exact"], found.numbers["psnr"] > 0) == (
        True,
        1,
        1,
        True,
    )
    (receipt,) = [part.receipt for part in as_int8[1]]
    parts = receipt.fingerprint_parts
    assert (parts["storage_dtype"], parts["compression"]) == ("int8", "zstd")

    def scaled(factor):
        def change(encode, planes, matrices, state):
            posterior, after = encode(planes, matrices, state)
            return replace(posterior, mean=posterior.mean * factor), after

        return change

    monkeypatch.setattr(canary, "environment", lambda device: {"cpu": "another"})
    for factor, ok in ((1 + 5e-4, True), (1.05, False)):
        with pytest.MonkeyPatch.context() as patch:
            with_encoder(patch, scaled(factor))
            check = canary_check(StorageConfig())(*as_int8)
            assert (check.ok, check.numbers["bit_exact"]) == (ok, 0), check.message


def test_latents_of_a_compiled_network_are_compared_within_the_tolerance(parts) -> None:
    """The check compiles nothing, so it has other bits on the same machine."""
    store, plain = parts
    compiled = []
    for part in plain:
        named = part.receipt.fingerprint_parts
        changed = {**named, "encoder": {**named["encoder"], "compiled": True}}
        compiled.append(replace(part, receipt=replace(part.receipt, fingerprint_parts=changed)))

    def scaled(encode, planes, matrices, state):
        posterior, after = encode(planes, matrices, state)
        return replace(posterior, mean=posterior.mean * (1 + 1e-5)), after

    with pytest.MonkeyPatch.context() as patch:
        with_encoder(patch, scaled)
        assert not canary_check(StorageConfig())(store, plain).ok
        check = canary_check(StorageConfig())(store, compiled)
    assert (check.ok, check.numbers["same_machine"], check.numbers["bit_exact"]) == (True, 0, 0)


def change_log_variance(monkeypatch, change) -> None:
    """Puts an encoder in whose log-variances alone are others: `change` of them and the state."""

    def changed(encode, planes, matrices, state):
        posterior, after = encode(planes, matrices, state)
        return replace(posterior, logvar=change(posterior.logvar, state)), after

    with_encoder(monkeypatch, changed)


def test_log_variances_are_compared_where_they_are_stored(parts, with_moments) -> None:
    check = canary_check(StorageConfig())(*with_moments)
    numbers = check.numbers
    assert (check.ok, numbers["clips"], numbers["bit_exact"], numbers["log_variances"]) == (True, 1, 1, 1)
    assert canary_check(StorageConfig())(*parts).numbers["log_variances"] == 0


def test_conditions_are_compared_where_they_are_stored(parts, with_moments, monkeypatch) -> None:
    assert canary_check(StorageConfig())(*with_moments).numbers["conditions"] == 1
    assert canary_check(StorageConfig())(*parts).numbers["conditions"] == 0
    plain = LatentDecoder.__init__

    def init(self, *arguments) -> None:
        plain(self, *arguments)
        encode = self.vae.encode_condition
        self.vae.encode_condition = lambda planes, *rest: encode(255 - planes, *rest)

    monkeypatch.setattr(LatentDecoder, "__init__", init)
    check = canary_check(StorageConfig())(*with_moments)
    assert not check.ok
    assert "such as the i2v_cond of a-" in check.message


def test_log_variances_with_other_bits_fail(with_moments, monkeypatch) -> None:
    change_log_variance(monkeypatch, lambda logvar, state: logvar + 1)
    check = canary_check(StorageConfig())(*with_moments)
    assert not check.ok
    assert "1 of 1 clips, encoded again on a machine of the kind that made them, differ" in check.message
    assert "such as the log-variance of a-" in check.message
    assert check.numbers["bit_exact"] == 0


def test_log_variances_beyond_the_tolerance_fail_on_another_machine(with_moments, monkeypatch) -> None:
    monkeypatch.setattr(canary, "environment", lambda device: {"cpu": "another"})
    with pytest.MonkeyPatch.context() as patch:
        change_log_variance(patch, lambda logvar, state: logvar * (1 + 1e-4))
        check = canary_check(StorageConfig())(*with_moments)
        assert (check.ok, check.numbers["bit_exact"]) == (True, 0)
    change_log_variance(monkeypatch, lambda logvar, state: logvar * 1.1)
    assert "from what is stored, allowed is 0.001" in canary_check(StorageConfig())(*with_moments).message


def test_log_variances_that_depend_on_chunks_fail(with_moments, monkeypatch) -> None:
    change_log_variance(monkeypatch, lambda logvar, state: logvar if state is None else logvar + 1)
    check = canary_check(StorageConfig())(*with_moments)
    assert "1 of 1 clips encode to other latents in chunks than whole" in check.message


@pytest.mark.parametrize(
    ("num_frames", "stride", "lead", "chunk"),
    [
        (17, 4, 1, 8),
        (17, 8, 1, 8),
        (9, 4, 1, 4),
        (5, 4, 1, 4),
        (81, 4, 1, 16),
        (16, 4, 0, 8),
        (33, 1, 1, 16),
        (1, 4, 1, 4),
    ],
)
def test_also_a_short_clip_is_cut_into_chunks(num_frames: int, stride: int, lead: int, chunk: int) -> None:
    spec = LatentSpec("tiny", 4, time_stride=stride, lead_frames=lead)
    assert canary._chunk_frames(spec, num_frames) == chunk
    assert canary._chunk_frames(replace(spec, chunking="none"), num_frames) == num_frames


def test_on_another_machine_differences_stay_within_the_tolerance(parts, monkeypatch) -> None:
    monkeypatch.setattr(canary, "environment", lambda device: {"cpu": "another"})
    noise = iter(np.random.default_rng(0).normal(size=1000))

    def inexact(encode, planes, matrices, state):
        posterior, after = encode(planes, matrices, state)
        return replace(posterior, mean=posterior.mean * (1 + 1e-6 * abs(next(noise)))), after

    with pytest.MonkeyPatch.context() as patch:
        with_encoder(patch, inexact)
        patch.setattr(canary, "WHOLE_FRAMES", 1)  # what chunks do is another matter here
        check = canary_check(StorageConfig())(*parts)
    assert check.ok, check.message
    assert (check.numbers["same_machine"], check.numbers["bit_exact"]) == (0, 0)
    with_encoder(monkeypatch, lambda encode, planes, *rest: encode(255 - planes, *rest))
    assert "from what is stored, allowed is 0.001" in canary_check(StorageConfig())(*parts).message


def test_a_round_trip_below_a_floor_fails_for_trained_weights() -> None:
    found = canary._Measured(clips=2, bit_exact=2, differences=[0.0, 0.0], psnr=[9.0, 10.0], ssim=[0.2, 0.3])
    message = canary._judge(found, 1e-3, 15.0, 0.5, trained=True).message
    assert "decode to 9.50 dB PSNR on average, expected at least 15 dB" in message
    assert "decode to 0.250 SSIM on average, expected at least 0.5" in message
    assert canary._judge(found, 1e-3, 9.0, 0.2, trained=True).ok
    assert canary._judge(found, 1e-3, 15.0, 0.5, trained=False).ok


@pytest.mark.parametrize("field", ["differences", "psnr", "ssim"])
def test_a_value_that_is_not_a_number_fails_and_leaves_valid_json(field: str) -> None:
    values = {"differences": [0.0, 0.0], "psnr": [30.0, 30.0], "ssim": [0.9, 0.9]} | {field: [float("nan"), 0.5]}
    check = canary._judge(canary._Measured(clips=2, **values), 1e-3, 0.1, 0.1, trained=True)
    assert not check.ok
    assert check.numbers["psnr"] is None or field != "psnr"
    assert check.numbers["ssim"] is None or field != "ssim"


def test_sources_that_are_gone_are_not_judged(job, parts, tmp_path) -> None:
    store, found = parts
    moved = [
        replace(
            part,
            receipt=replace(
                part.receipt,
                shard=replace(
                    part.receipt.shard,
                    objects=tuple(replace(item, uri=f"/nowhere{item.uri}") for item in part.receipt.shard.objects),
                ),
            ),
        )
        for part in found
    ]
    check = canary_check(StorageConfig())(store, moved)
    assert (check.ok, check.judged, check.numbers["without_source"]) == (True, False, 2)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_the_commands_publish_list_compare_and_measure(tmp_path) -> None:
    """As a user: encode --publish, another video, publish, snapshots, diff, stats, and each reader of one snapshot."""
    corpus, out = tmp_path / "corpus", str(tmp_path / "out")
    corpus.mkdir()
    (corpus / "a.mp4").write_bytes(video_bytes(13, seed=1))
    config = json.dumps(TINY_NETWORK)
    encode = ["encode", str(corpus), out, "--model", "leanvae", "--untrained", "0", "--frames", "5", "--size", "32x32"]
    encode += ["--clips", "tile", "--executor", "inline", "--progress", "none", "--set", f"model.config={config}"]
    assert "snapshot 1: 2 rows, 10 frames in 1 file" in run(*encode, "--publish")
    (corpus / "b.mp4").write_bytes(video_bytes(13, seed=2))
    assert "1 shard or input is not done" in run("publish", out, str(corpus), code=1)
    run(*encode)
    assert "pending   1 shard with 2 clips" in run("status", out)
    text = run("publish", out, str(corpus))
    assert "against snapshot 1: inputs +1 -0, 0 replaced; rows +2 -0" in text
    assert "canary: ok" in text
    assert [item["counts"]["rows"] for item in json.loads(run("snapshots", out, "--json"))["snapshots"]] == [2, 4]
    assert "2 -> 4 rows" in run("diff", f"{out}@1", f"{out}@2")
    found = json.loads(run("stats", f"{out}@2", "--plot", str(tmp_path / "plot.png"), "--json"))
    (item,) = found["fingerprints"].values()
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert item["buckets"]["v5x32x32"]["clips"] == 4
    assert item["sample"]["mean"] == pytest.approx(item["exact"]["mean"], abs=1e-5)
    assert item["sample"]["std"] == pytest.approx(item["exact"]["std"], rel=1e-4)
    assert "0 problems" not in run("verify", f"{out}@1")
    assert json.loads(run("inspect", f"{out}@1", "--json"))["counts"]["rows"] == 2
    shown = json.loads(run("preview", f"{out}@1", "--sheet", str(tmp_path / "sheet.png"), "--json"))
    assert {row["key"] for row in shown["clips"]} == {"a"}
    assert "no snapshot 5; there are 1, 2" in CliRunner().invoke(app, ["status", f"{out}@5"]).output
    assert len(list(Ledger(open_store(out, StorageConfig())).all())) == 2
    job = tmp_path / "job.yaml"
    for n in (3, 4):
        (corpus / f"broken{n}.mp4").write_bytes(b"broken" * n)
    job.write_text(f"inputs: [{corpus}]\noutput: {out}\nreject_budget: 0.9\n")
    run(*encode, "--set", "reject_budget=0.9")
    refused = "2 of 4 inputs are damaged (50.0%), the limit is 5.0%"
    again = ["publish", out, str(corpus), "--canary", "0", "--no-delta"]
    assert refused in run(*again, code=1)
    assert "limit is 40.0%" in run(*again, "--config", str(job), "--reject-budget", "0.4", code=1)
    assert run(*again, "--config", str(job)).startswith("snapshot 3")
