"""Validation of options: the error names the field, its value and what is valid."""

import pickle

import pytest

from pipeline.config import EncodeJob, Section, build_job
from pipeline.errors import ConfigError

FLAGS = {"inputs": ["a.tar"], "output": "out"}


def test_sources_win_in_order_defaults_file_flags_set(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        "inputs: [x.tar]\noutput: o\nclips: {fps: 8, frames: [5, 9], size: 64x64}\nwrite: {dtype: bfloat16}\n"
    )
    job = build_job({"clips.fps": "16", "output": None}, config_path=str(path), overrides=("clips.size=32x32",))
    assert (job.inputs, job.output) == (("x.tar",), "o")
    assert (job.clips.fps, job.clips.frames, job.clips.size) == (16.0, (5, 9), ("32x32",))
    assert (job.write.dtype, job.write.format) == ("bfloat16", "parquet")
    assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301 - our own bytes


def test_braces_in_inputs_keep_their_commas():
    assert EncodeJob(inputs="{a,b}.tar", output="o").inputs == ("{a,b}.tar",)
    assert build_job({**FLAGS, "clips.frames": "17,33", "clips.size": "64x64,32x96"}).clips.size == ("64x64", "32x96")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("clips.frams=3", r"clips.frams: no such field; known here: buckets, crop, fps, frames"),
        ("nonsense=1", r"nonsense: no such field; known here: allow_empty, annotations, clips"),
        ("clips.fps=abc", r"clips.fps: expected a number of frames per second or 'source', got 'abc'"),
        ("clips.fps=-1", r"clips.fps: .*greater than 0.*got -1"),
        ("clips.size=big", r"clips.size: expected HEIGHTxWIDTH such as 256x256, got 'big'"),
        ("clips.size=[area:64x64, 32x32]", r"expected area:HxW alone"),
        ("clips.buckets=17x64", r"clips.buckets: expected FRAMESxHEIGHTxWIDTH"),
        (
            "clips.select=slide",
            r"clips.select: expected head, tile, whole, slide:STRIDE, uniform:N, or spans, .*, got 'slide'",
        ),
        ("clips.frames=0", r"clips.frames: expected frame counts of at least 1"),
        ("write.dtype=int4", r"write.dtype: .*float16.*got 'int4'"),
        ("model=leanvae", r"model: .*dictionary.*got 'leanvae'"),
        ("model=null", r"model: .*dictionary.*got None"),
        ("model.device=tpu", r"model.device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("engine.batch=0", r"engine.batch: .*got 0"),
        ("engine.hang_s=inf", r"engine.hang_s: .*finite.*got"),
        ("reject_budget=2", r"reject_budget: .*got 2"),
        ("drill.point=before_commit", r"drill: .*marker_dir"),
        ("clips=3", r"clips: .*got 3"),
        ("output.x=3", r"output.x: 'output' is not a section|output"),
        ("nothing", r"--set nothing: expected section.key=value"),
        ("model.config=[", r"--set model.config=\[: not YAML"),
        ("clips.fps=2024-99-99", r"--set clips.fps=2024-99-99: not YAML"),
    ],
)
def test_the_error_names_the_invalid_field(override, text):
    with pytest.raises(ConfigError, match=text) as caught:
        build_job(FLAGS, overrides=(override,))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_checkpoint_and_untrained_exclude_each_other():
    with pytest.raises(ConfigError, match="exclude each other"):
        build_job({**FLAGS, "model.untrained": 0, "model.checkpoint": "w.ckpt"})


def test_an_empty_section_of_a_job_file_is_the_default(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("clips:\n  # fps: 8\nwrite:\n")
    assert build_job({**FLAGS, "clips.fps": "4"}, config_path=str(path)).clips.fps == 4.0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[1, 2]", "mapping"),
        (b"a: [", "not YAML"),
        (None, "cannot be read"),
        (b"\xff\xfe", "not UTF-8"),
        (b"1: 2", "1: no such field"),
    ],
)
def test_an_unreadable_job_file_is_an_error(tmp_path, content, text):
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        build_job(FLAGS, config_path=str(path))


def test_missing_required_fields_are_named():
    with pytest.raises(ConfigError, match="inputs: is required; output: is required"):
        build_job({})


def sections(kind=EncodeJob):
    yield kind
    for field in kind.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


def test_every_option_has_a_docstring():
    undocumented = [
        f"{kind.__name__}.{name}"
        for kind in sections()
        for name, field in kind.model_fields.items()
        if not field.description and not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    ]
    assert undocumented == []


def test_a_numbered_gpu_with_ray_is_refused_with_an_alternative():
    flags = {"inputs": ["in"], "output": "out", "model.device": "cuda:1"}
    with pytest.raises(ConfigError, match=r"--device cuda and set CUDA_VISIBLE_DEVICES=1"):
        build_job(flags)
    assert build_job({**flags, "engine.executor": "inline"}).model.device == "cuda:1"


def test_password_of_an_endpoint_is_in_no_record_of_a_job():
    """Run logs, reports and snapshots hold the job."""
    job = EncodeJob(inputs=["a"], output="b", storage={"endpoint_url": "https://me:secret@store.example:9000/x"})
    assert job.storage.endpoint_url == "https://me:secret@store.example:9000/x"
    assert job.model_dump(mode="json")["storage"]["endpoint_url"] == "https://store.example:9000/x"
    assert "secret" not in job.model_dump_json()
