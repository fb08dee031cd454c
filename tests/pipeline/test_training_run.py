"""`lathe train` as a user runs it: to the end, through a kill, and into every refusal."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from model.training import run_folder
from pipeline.cli import app as cli
from pipeline.errors import (
    ConfigError,
    FatalError,
    InputError,
    LatheError,
    StorageUnavailable,
    TrainingError,
    WorkerLost,
)
from pipeline.synthetic_videos.source import SyntheticSource
from pipeline.training import run
from pipeline.training.job import build_train_job
from pipeline.training.progress_log import ProgressLog
from tests.model.test_out_of_memory import TEXTS
from tests.tiny_corpus import make_corpus, video_bytes, write_tar
from tests.tiny_training import RECIPE, lines, train, write_job

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=2, samples=3)


def invoke(*arguments) -> tuple[int, str, str]:
    found = CliRunner().invoke(cli.app, ["train", *map(str, arguments)])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.stdout, found.stderr


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of twelve steps on the corpus in this process: its folder and its output."""
    folder = tmp_path_factory.mktemp("finished")
    job = write_job(folder / "job.yaml", data={"inputs": [str(corpus)], "clips": {"scale": [1, 1.5]}})
    return folder, invoke(job)


def test_a_run_ends_with_weights_and_prints_the_command_that_uses_them(finished, corpus):
    folder, (code, out, err) = finished
    assert code == 0, err
    printed = err.splitlines()
    assert printed[:3] == [
        f"lathe: 12 steps of leanvae into {folder / 'run'}",
        "lathe: reading 2 shards once, to index their videos",
        "lathe: 6 videos",
    ]
    assert printed[3].startswith("lathe: step 6/12, loss ")
    assert printed[-1].startswith("lathe: step 12/12, loss ")
    weights = folder / "run" / "weights"
    run = json.loads((weights / "run.json").read_text())
    assert (run["steps"], run["data"]["inputs"], run["data"]["clips"]["scale"]) == (12, [str(corpus)], [1, 1.5])
    assert run["recipe"]["network"] == "leanvae"
    assert f"unusable videos: too_short (2); see {folder / 'run' / 'corpus' / 'unusable.jsonl'}" in out
    assert out.splitlines()[-1] == f"use them: lathe encode --model leanvae --checkpoint {weights} INPUT... OUTPUT"
    arguments = [
        "--model",
        "leanvae",
        "--checkpoint",
        weights,
        "--frames",
        "5",
        "--size",
        "32x32",
        "--executor",
        "inline",
    ]
    found = CliRunner().invoke(cli.app, ["encode", *map(str, arguments), str(corpus), str(folder / "latents")])
    assert found.exit_code == 0, found.stderr
    assert "4 encoded" in found.stdout


def test_a_killed_run_continues_to_the_same_weights(finished, corpus, tmp_path):
    folder, _ = finished
    data = {"inputs": [str(corpus)], "clips": {"scale": [1, 1.5]}}
    drill = {"point": "in_training", "marker_dir": str(tmp_path / "markers")}
    job = write_job(tmp_path / "job.yaml", data=data, drill=drill, loaders=1, progress="json")
    assert train(job).returncode == -9
    assert [line["step"] for line in lines(tmp_path / "run")] == [6]
    code, out, err = invoke(job, "--set", "loaders=0")  # who makes the clips changes none of them
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0] == {
        "event": "notice",
        "text": f"{tmp_path / 'run'} holds 4 of 12 steps; continuing from there",
    }
    assert [event["step"] for event in events if event["event"] == "progress"] == [6, 12]
    assert events[-1]["event"] == "report"
    assert events[-1]["unusable"] == {"too_short": 2}
    for here, there in zip(lines(folder / "run"), lines(tmp_path / "run"), strict=True):
        assert there == pytest.approx(here)
    before, after = (load_file(place / "run" / "weights" / "model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_allclose(before[key], after[key], rtol=0, atol=1e-6)


def test_a_finished_run_has_nothing_left_to_do(finished):
    folder, _ = finished
    before = (folder / "run" / "metrics.jsonl").read_text()
    code, out, err = invoke(folder / "job.yaml", "--set", "progress=plain")
    assert code == 0, err
    assert "holds 12 of 12 steps" in err
    assert "weights:" in out
    assert "data is not" not in err
    for seed in (1, 0):  # said; and what was said is what the next is compared with
        _, _, err = invoke(folder / "job.yaml", "--set", f"data.seed={seed}", "--set", "data.cache_bytes=0")
        assert (
            f"data has changed since this run started (seed: was {1 - seed}, is {seed}); the run continues with the new one"
            in err
        )
    assert (folder / "run" / "metrics.jsonl").read_text() == before


def job_of(tmp_path, **values):
    job = {"recipe": RECIPE, "data": {"synthetic": {}}, "output": str(tmp_path / "run"), "device": "cpu", "loaders": 0}
    return build_train_job({**job, **values})


def prepared(tmp_path, **values) -> run.PreparedRun:
    return run.prepare(job_of(tmp_path, **values), ProgressLog("none"))


def learned(tmp_path, source=None, **values) -> LatheError:
    """Error that a run ends with."""
    made = prepared(tmp_path, **values)
    made = run.PreparedRun(made.job, made.recipe, source or made.source, made.folder, 0, None)
    with pytest.raises(LatheError) as caught:
        run.learn(made, "cpu", lambda step, values: None)
    return caught.value


def test_a_folder_of_another_recipe_or_of_something_else_is_refused(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(ConfigError, match=r"output: .*run of another recipe.*seed: was 0, is 1"):
        prepared(folder, overrides={"seed": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"output: .* is not empty and is not a run"):
        prepared(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output: .*cannot be a run's folder"):
        prepared(tmp_path, output=str(tmp_path / "file" / "run"))


def test_an_unusable_corpus_is_refused_before_training(corpus, tmp_path):
    groups = {"stages": [{**RECIPE["stages"][0], "groups": [{"frames": 33, "height": 32, "width": 32, "batch": 1}]}]}
    with pytest.raises(InputError, match=r"none of 6 videos has a clip of 33 frames of 32x32: too_short \(6\)"):
        prepared(tmp_path, data={"inputs": [str(corpus)]}, overrides=groups)


class Spoiled(SyntheticSource):
    """Source that fails on its fourth clip, in any process."""

    def __init__(self, error: Exception) -> None:
        super().__init__(0)
        self.error = error

    def clip(self, index, frames, height, width):
        if index >= 4:
            raise self.error
        return super().clip(index, frames, height, width)


def test_a_refused_second_run_leaves_the_record_of_the_first_alone(corpus, tmp_path, monkeypatch):
    """Its clips and its list of unusable videos are those of the run in progress."""
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.1)
    first = prepared(tmp_path, data={"inputs": [str(corpus)]})
    first.unusable.add("a.tar", "k", "too_short", "3 frames")
    files = [tmp_path / "run" / name for name in ("data.json", "corpus/index.parquet", "corpus/unusable.jsonl")]
    before = [path.read_bytes() for path in files]
    others = make_corpus(tmp_path / "others", shards=1, samples=2)

    def beside(step, values):
        for data in ({"synthetic": {"seed": 1}}, {"inputs": [str(others)]}):
            with pytest.raises(ConfigError, match=r"output: .* is in use by a run in another process"):
                prepared(tmp_path, data=data)

    run.learn(first, "cpu", beside)
    assert [path.read_bytes() for path in files[:2]] == before[:2]
    assert files[2].read_bytes().startswith(before[2])
    assert json.loads((tmp_path / "run/weights/run.json").read_text())["data"]["inputs"] == [str(corpus)]


def unusable_of(made: run.PreparedRun) -> dict[str, int]:
    return made.unusable.counts()


def test_a_changed_option_of_clips_or_loss_is_noted_and_videos_used_now_are_not_listed(tmp_path, capsys):
    tar = write_tar(
        tmp_path / "a.tar",
        {"a": {"mp4": video_bytes(9)}, "b": {"mp4": video_bytes(9, 24, 24)}, "c": {"txt": b"no video"}},
    )
    data = {"inputs": [str(tar)]}
    first = prepared(tmp_path, data=data)
    run.learn(first, "cpu", lambda step, values: None)
    assert unusable_of(first) == {"too_small": 1, "no_video": 1}
    assert unusable_of(prepared(tmp_path, data=data)) == {"too_small": 1, "no_video": 1}

    def noted(**values) -> str:
        capsys.readouterr()
        run.prepare(job_of(tmp_path, **values), ProgressLog("plain"))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "data has changed" in line] or [""]
        return line.partition("started (")[2].partition("); the run")[0]

    assert noted(data=data, decode={"timeout_s": 1}, storage={"spool_bytes": 2**20}) == ""
    lpips = str(tmp_path / "vgg.safetensors")
    assert noted(data=data, lpips=lpips) == f"lpips: was None, is {{'features': '{lpips}', 'heads': None}}"
    assert noted(data=data, decode={"hdr": "convert"}, lpips="x").startswith(
        "decode.hdr: was 'reject', is 'convert'; lpips."
    )
    larger = prepared(tmp_path, data={**data, "clips": {"upscale": True}})
    assert unusable_of(larger) == {"no_video": 1}
    assert noted(data=data) == "clips.upscale: was True, is False"


def test_videos_that_only_a_corrected_recipe_can_use_are_not_listed(corpus, tmp_path):
    groups = {"stages": [{**RECIPE["stages"][0], "groups": [{"frames": 33, "height": 32, "width": 32, "batch": 1}]}]}
    with pytest.raises(InputError):
        prepared(tmp_path, data={"inputs": [str(corpus)]}, overrides=groups)
    assert sum(unusable_of(prepared(tmp_path, data={"inputs": [str(corpus)]})).values()) < 6


def test_errors_of_loading_processes_reach_the_user_unchanged(tmp_path):
    error = learned(tmp_path, Spoiled(InputError("data.inputs: none of 3 videos has a clip")), loaders=1)
    assert type(error) is InputError
    assert str(error) == "data.inputs: none of 3 videos has a clip"
    error = learned(tmp_path, Spoiled(ValueError("the source returned a clip: of 3 frames")))
    assert type(error) is ConfigError
    assert str(error) == "the source returned a clip: of 3 frames"


class Deadly(SyntheticSource):
    """Source whose first clip ends the loading process, as a crashing decoder would."""

    def clip(self, index, frames, height, width):
        if torch.utils.data.get_worker_info() is not None:
            os._exit(11)
        return super().clip(index, frames, height, width)


def test_a_dying_loading_process_ends_the_run_with_a_reason(tmp_path):
    error = learned(tmp_path, Deadly(0), loaders=1)
    assert type(error) is WorkerLost
    assert "a loading process died" in str(error)


STALE = OSError(errno.ESTALE, "Stale file handle", "/mnt/a.mp4")


@pytest.mark.parametrize(
    ("failure", "loaders", "kind", "text"),
    [
        (STALE, 0, StorageUnavailable, "Stale file handle: '/mnt/a.mp4'"),
        (STALE, 1, StorageUnavailable, "Stale file handle: '/mnt/a.mp4'"),
        (ChildProcessError("the process that forks decoders was killed"), 1, WorkerLost, "decoders was killed"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/mnt/a.mp4"), 1, TrainingError, "No such file: '/mnt/a.mp4'"),
        (OSError(errno.ENOSPC, "No space left", "/tmp/a"), 0, TrainingError, "No space left: '/tmp/a'"),
    ],
)
def test_failures_of_disks_and_processes_that_may_pass_are_transient(failure, loaders, kind, text, tmp_path):
    """Ray Train restarts a run after these, and ends it after a `FatalError`."""
    error = learned(tmp_path, Spoiled(failure), loaders=loaders)
    assert type(error) is kind
    assert isinstance(error, FatalError) == (kind is TrainingError)
    assert text in str(error)
    assert "Traceback" not in str(error)


def test_a_checkpoint_that_cannot_be_written_is_transient_unless_the_disk_is_full(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    assert type(learned(tmp_path / "a")) is StorageUnavailable
    monkeypatch.setattr(run_folder, "FULL_BYTES", 2**80)
    assert type(learned(tmp_path / "b")) is TrainingError


def test_a_non_finite_loss_ends_the_run_naming_step_and_clips(tmp_path):
    stage = {**RECIPE["stages"][0], "learning_rate": 1e30, "final_learning_rate": 1e30}
    error = learned(tmp_path, overrides={"stages": [stage], "optimizer": {"clip": None}})
    assert type(error) is TrainingError
    assert error.exit_code == 1
    assert "is not finite" in str(error)
    assert "synthetic/0/" in str(error)


def test_missing_unreadable_or_wrong_weights_are_named(tmp_path, monkeypatch):
    start = {"start": {"weights": str(tmp_path / "gone.safetensors")}}
    gone = learned(tmp_path / "a", overrides=start)
    assert gone.exit_code == 2
    assert "gone.safetensors" in str(gone)

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)  # permissions do not bind root, who may run this

    with monkeypatch.context() as patched:
        patched.setattr("model.checkpoint.fetch", refused)
        locked = learned(tmp_path / "c", overrides=start)
    assert locked.exit_code == 2
    assert "gone.safetensors cannot be read: Permission denied; check" in str(locked)
    save_file({"features.0.weight": np.zeros((1,), np.float32)}, tmp_path / "vgg.safetensors")
    other = learned(tmp_path / "b", lpips=str(tmp_path / "vgg.safetensors"))
    assert str(other).startswith("lpips: ")
    assert other.exit_code == 2


def test_the_command_names_what_is_wrong_with_its_file(tmp_path):
    job = write_job(tmp_path / "job.yaml", data={"synthetic": {}}, speed=3)
    code, _, err = invoke(job)
    assert code == 2
    assert err.startswith("lathe: error: speed: no such field; known here: ")
    assert invoke(tmp_path / "none.yaml")[0] == 2
    job.write_text(yaml.safe_dump({"recipe": "embedded", "output": "run"}))
    assert "data: is required" in invoke(job)[2]


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[2], TEXTS[5], TEXTS[-1]])
def test_out_of_memory_is_reported_without_the_librarys_numbers(text):
    error = run._known_failure(RuntimeError(text))
    assert type(error) is TrainingError
    assert str(error).startswith("training ran out of memory; use smaller batches")
    assert run._known_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
