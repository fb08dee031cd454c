"""`lathe models` and `lathe check`: facts about a network, and whether it is lossless here."""

import json

import pytest
import torch
from typer.testing import CliRunner

from model import registry
from pipeline.cli.app import app
from tests.tiny_corpus import TINY_NETWORK

TINY = ("--set", f"model.config={json.dumps(TINY_NETWORK)}")


def lathe(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_models_lists_every_network_with_its_facts():
    header, *lines = lathe("models").stdout.splitlines()
    assert header.split()[:4] == ["name", "channels", "stride", "frames"]
    assert [line.split()[0] for line in lines] == list(registry.names())
    (lean,) = [line for line in lines if line.startswith("leanvae-dim4 ")]
    for word in (
        "4x8x8",
        "4n+1",
        "[-0.5, 0.5]",
        "scale 0.7744",
        "exact",
        "MIT",
        "hf://Yumic/LeanVAE/LeanVAE-dim4.ckpt",
    ):
        assert word in lean


@pytest.mark.parametrize("name", registry.names())
def test_models_shows_the_facts_of_one_network(name):
    output = lathe("models", name).stdout
    assert output.startswith(name)
    card = json.loads(lathe("models", name, "--json").stdout)[name]
    assert card["licence"]
    assert card["source"].startswith("https://")
    assert card["published"] is None or card["published"].startswith(("hf://", "embedded://"))
    assert card["spec"]["network"] == name
    assert card["source"] in output
    for alias in card["aliases"]:
        assert lathe("models", alias).stdout == output


def test_unknown_names_and_families_have_different_errors():
    assert "leanvae-dim16" in lathe("models", "nonesuch", code=2).stderr
    assert "family" in lathe("models", "leanvae", code=2).stderr


def test_check_reports_its_measurements():
    threads = torch.get_num_threads()
    more = ("--set", f"engine.threads={threads + 1}")
    result = lathe("check", "leanvae", *TINY, *more, "--untrained", 0, "--size", "16x24", "--device", "cpu")
    assert torch.get_num_threads() == threads
    assert "UNTRAINED" in result.stdout
    assert "lossless" in result.stdout.splitlines()[0]
    assert result.stdout.count("  ok") == 19
    verdict = json.loads(
        lathe("check", "leanvae", *TINY, "--untrained", 0, "--size", "16x24", "--device", "cpu", "--json").stdout
    )
    assert verdict["ok"]
    assert verdict["claim"] == {"encode": "exact", "decode": "exact"}
    assert {finding["difference"] for finding in verdict["findings"]} == {0.0}


def test_check_runs_compiled_steps_where_the_job_or_an_option_says_so(tmp_path, monkeypatch):
    """The compiler is replaced by one that changes nothing."""
    compiled = []

    def compile_(step, **how):
        compiled.append(how)
        return lambda *tensors: step(*tensors)

    monkeypatch.setattr("torch.compile", compile_)
    (tmp_path / "job.yaml").write_text("engine: {compile: on}\n")
    arguments = (
        "check",
        "leanvae",
        *TINY,
        "--untrained",
        0,
        "--size",
        "16x24",
        "--device",
        "cpu",
        "--config",
        "job.yaml",
    )
    monkeypatch.chdir(tmp_path)
    assert "float32 on cpu, eager, frames 16x24: lossless" in lathe(*arguments, "--compile", "off").stdout
    assert compiled == []
    assert "float32 on cpu, compiled, frames 16x24: lossless" in lathe(*arguments).stdout
    assert len(compiled) == 4, "first and later steps of encoder and decoder"


def test_check_fails_for_a_network_that_is_not_lossless(monkeypatch):
    from model.leanvae.vae import LeanVAE

    split = LeanVAE.split_state
    monkeypatch.setattr(LeanVAE, "split_state", lambda self, state: list(reversed(split(self, state))))
    result = lathe("check", "leanvae", *TINY, "--untrained", 0, "--size", "16x24", "--device", "cpu", code=1)
    assert "NOT LOSSLESS" in result.stdout
    assert result.stdout.count("FAILED") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("leanvae-dim4",), "needs weights"),
        (("nonesuch", "--untrained", 0), "unknown network"),
        (("leanvae", *TINY, "--untrained", 0, "--size", "16x20"), "multiples of 8, got 16x20"),
        (("leanvae", *TINY, "--untrained", 0, "--size", "big"), "big"),
        (("leanvae", *TINY, "--untrained", 0, "--checkpoint", "x.ckpt"), "exclude"),
        (("leanvae", "--checkpoint", "nowhere.ckpt"), "nowhere.ckpt"),
        (
            ("taesd", "--untrained", 0, "--compile", "on"),
            "taesd is a network of diffusers, which is not compiled; --compile off",
        ),
        (("nonesuch", "--untrained", 0, "--compile", "on"), "unknown network"),
    ],
)
def test_wrong_commands_give_one_line_and_exit_code_2(arguments, words):
    result = lathe("check", *arguments, code=2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
