"""A build with a compiled network, in this process: its rows, its fingerprint, what resumes it and what is refused."""

import numpy as np
import pytest

import pipeline
from pipeline.cli.wording import build_lines
from pipeline.encoder.compiling import missing_compiler
from pipeline.errors import ConfigError
from tests.tiny_corpus import TINY_NETWORK, make_corpus, receipts, rows, tiny_job

pytestmark = pytest.mark.skipif(
    missing_compiler("cpu") is not None, reason=f"nothing can be compiled here: {missing_compiler('cpu')}"
)

# Clips of one frame need one step. A compiler takes half a minute for it on one core, on a machine that has not compiled it before.
SMALLEST = {**TINY_NETWORK, "ista_iter_num": 1, "ista_layer_num": 1, "sep_num_layer": 1, "fusion_num_layer": 2}
FLAGS = {"model.config": SMALLEST, "clips.frames": "1"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=1, samples=2)


@pytest.fixture(scope="module")
def compiled(corpus, tmp_path_factory):
    """An output of a compiled network, and the report of its build."""
    output = tmp_path_factory.mktemp("compiled") / "out"
    return output, pipeline.encode(tiny_job(corpus, output, "engine.compile=on", **FLAGS))


def test_a_compiled_build_says_so_and_its_time_is_not_that_of_encoding(compiled):
    output, report = compiled
    assert (report.compiled, report.compile_reason) == (True, "engine.compile=on")
    assert report.compile_s > 0
    assert "compile: on, engine.compile=on" in report.notices
    text = "\n".join(build_lines(report))
    assert "s to compile the network" in text
    assert "  compile   on, engine.compile=on" in text
    (receipt,) = receipts(output)
    assert receipt.fingerprint_parts["encoder"]["compiled"] is True


def test_compiled_latents_are_those_of_the_plain_network_up_to_rounding(compiled, corpus, tmp_path):
    output, report = compiled
    plain = pipeline.encode(tiny_job(corpus, tmp_path / "plain", **FLAGS))
    assert not plain.compiled
    assert plain.fingerprint != report.fingerprint
    one, other = (
        {(row["source_key"], row["clip_index"]): row for row in rows(folder).values()}
        for folder in (output, tmp_path / "plain")
    )
    assert one.keys() == other.keys()
    for key, row in one.items():
        latent, expected = (np.frombuffer(each["vae_latent_bytes"], "<f4") for each in (row, other[key]))
        np.testing.assert_allclose(latent, expected, atol=1e-4)


def test_a_later_build_follows_the_output_and_the_other_choice_is_refused(compiled, corpus):
    output, report = compiled
    with pytest.raises(ConfigError, match=r"off was asked for, and the latents of .* are made with on"):
        pipeline.encode(tiny_job(corpus, output, "engine.compile=off", **FLAGS))
    later = pipeline.encode(tiny_job(corpus, output, **FLAGS))
    assert (later.compiled, later.compile_reason) == (True, "as the latents of this output")
    assert (later.fingerprint, later.shards_done, later.shards_before) == (report.fingerprint, 0, 1)
