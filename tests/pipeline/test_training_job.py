"""Training jobs: refused values, the recipe of a job, precedence of flags."""

from pathlib import Path

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.training.job import build_train_job, recipe_of
from tests.tiny_training import RECIPE, write_job

SYNTHETIC = {"recipe": "leanvae-mini", "data": {"synthetic": {"seed": 3}}, "output": "run"}


def test_a_job_merges_file_flags_and_overrides(tmp_path):
    path = write_job(tmp_path / "job.yaml", data={"synthetic": {"seed": 3}}, workers=2, lpips="vgg.safetensors")
    job = build_train_job({"output": "elsewhere"}, config_path=str(path), overrides=("workers=1", "data.seed=7"))
    assert (job.output, job.workers, job.data.seed, job.data.synthetic.seed) == ("elsewhere", 1, 7, 3)
    assert (job.lpips.features, job.lpips.heads) == ("vgg.safetensors", None)
    assert not job.distributed
    assert build_train_job({}, config_path=str(path)).distributed


def test_a_single_input_and_a_rate_as_text_are_accepted():
    job = build_train_job({**SYNTHETIC, "data": {"inputs": "a,{0..2}.tar", "clips": {"fps": "8"}}})
    assert job.data.inputs == ("a,{0..2}.tar",)
    assert job.data.clips.fps == 8.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loader": 2}, "loader: no such field; known here: address, data, decode"),
        ({"data.clips": {"speed": 2}}, "data.clips.speed: no such field; known here: fps, min_fps_ratio"),
        ({"data.synthetic": {"sed": 2}}, "data.synthetic.sed: no such field; known here: seed"),
        ({"data": {}}, "data: expected either synthetic: {seed: 0} or inputs: [shards, folders, …], got neither"),
        (
            {"data.inputs": ["a.tar"]},
            "data: expected either synthetic: {seed: 0} or inputs: [shards, folders, …], got both",
        ),
        ({"data": {"inputs": []}}, "data: expected at least one input, got []"),
        (
            {"data.clips": {"fps": "fast"}},
            "data.clips.fps: expected a number of frames per second or 'source', got 'fast'",
        ),
        (
            {"data.clips": {"scale": [2, 1]}},
            "data.clips.scale: expected two increasing factors of at least 1, such as [1, 2], got [2.0, 1.0]",
        ),
        ({"recipe": 3}, "recipe: expected a recipe's name, its file, or a mapping, got 3"),
        (
            {"output": "s3://bucket/run"},
            "output: expected a folder, local or on a file system that all machines share, got 's3://bucket/run'",
        ),
        ({"device": "tpu"}, "device: Input should be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ({"workers": 0}, "workers: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_impossible_values_are_refused_by_name(values, message):
    flags = {"recipe": "leanvae-mini", "data.synthetic": {"seed": 3}, "output": "run", **values}
    with pytest.raises(ConfigError) as caught:
        build_train_job(flags)
    assert str(caught.value).startswith(message)


def test_a_job_without_data_is_refused():
    with pytest.raises(ConfigError, match="data: is required"):
        build_train_job({"recipe": "leanvae-mini", "output": "run"})


def test_a_recipe_is_a_name_a_file_or_a_mapping_and_overrides_reach_into_all_three(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    over = {"seed": 5, "config": {"latent_dim": 8}}
    for recipe in ("leanvae-mini", str(file), RECIPE):
        found = recipe_of(build_train_job({**SYNTHETIC, "recipe": recipe, "overrides": over}))
        assert (found.seed, found.config["latent_dim"]) == (5, 8)
        assert found.config["embedding_dim"] == (160 if recipe == "leanvae-mini" else 32), (
            "keys beside the overridden one stay"
        )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("sonata", "recipe: no recipe 'sonata': neither a file nor one of ivvae"),
        ({**RECIPE, "sped": 1}, "recipe: sped: no such key"),
        ({**RECIPE, "network": "leanvaa"}, "recipe: .*leanvaa"),
    ],
)
def test_an_impossible_recipe_is_a_config_error(recipe, message):
    with pytest.raises(ConfigError, match=message) as caught:
        recipe_of(build_train_job({**SYNTHETIC, "recipe": recipe}))
    assert caught.value.exit_code == 2


def test_the_example_is_a_valid_job():
    example = Path(__file__).resolve().parents[2] / "docs" / "train.example.yaml"
    job = build_train_job({}, config_path=str(example))
    assert job.data.clips.scale == (1.0, 2.0)
    assert recipe_of(job).seed == 1
