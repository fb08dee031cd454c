"""Batches and out-of-memory change no latent: any mix of clips in a step and any halving give the same values."""

import time

import numpy as np
import pytest
import torch

import pipeline
from pipeline.cli.wording import build_lines
from pipeline.config import ModelConfig
from pipeline.encoder import Encoder, known_spec, resolve_device
from pipeline.engine.driver.executor import Executor
from pipeline.engine.ray.session import Cluster
from pipeline.engine.worker.encode_loop import EncodeLoop
from pipeline.errors import AccessError, BuildError, CheckpointError, ConfigError
from pipeline.records import FrameChunk
from tests.tiny_corpus import TINY_NETWORK, make_corpus, rows, tiny_job

CONFIG = ModelConfig(name="leanvae", config=TINY_NETWORK, untrained=0)


def clip(seed, groups, frames=4):
    """A clip of `groups` chunks, of 1 + frames and then `frames` frames."""
    rng = np.random.default_rng(seed)
    chunks = []
    for n in range(groups):
        length = frames + (n == 0)
        planes = rng.integers(16, 235, (length, 3, 32, 40), np.uint8)
        chunks.append(
            FrameChunk(
                seed,
                planes,
                tuple(map(float, range(length))),
                "bt709" if seed % 2 else "bt601",
                n == 0,
                n == groups - 1,
            )
        )
    return chunks


def alone(encoder, chunks):
    state, parts = None, []
    for chunk in chunks:
        launched = encoder.launch([chunk], [state])
        (result,), (state,) = launched.results(), launched.states
        parts.append(result.mean_Cthw)
    return np.concatenate(parts, axis=1)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(CONFIG, "cpu", "float32", batch=4)


def test_clips_in_one_batch_are_encoded_as_if_alone(encoder):
    clips = [clip(seed, 3) for seed in range(4)]
    expected = [alone(encoder, chunks) for chunks in clips]
    states, parts = [None] * 4, [[] for _ in clips]
    for n in range(3):
        order = [(i + n) % 4 for i in range(4)]  # another place in the batch each time
        launched = encoder.launch([clips[i][n] for i in order], [states[i] for i in order])
        for i, result, state in zip(order, launched.results(), launched.states, strict=True):
            states[i] = state
            parts[i].append(result.mean_Cthw)
    for i in range(4):
        np.testing.assert_array_equal(np.concatenate(parts[i], axis=1), expected[i])
        assert states[i] is None  # a last chunk's state is not kept


def test_out_of_memory_halves_the_batch_then_the_chunk_and_changes_nothing(monkeypatch):
    undisturbed = Encoder(CONFIG, "cpu", "float32")
    clips = [clip(seed, 2, frames=8) for seed in range(3)]
    begun = [undisturbed.launch([chunks[0]], [None]) for chunks in clips]
    expected = [launched.results()[0] for launched in begun]
    second = [
        undisturbed.encode([chunks[1]], launched.states)[0].mean_Cthw
        for chunks, launched in zip(clips, begun, strict=True)
    ]

    tight = Encoder(CONFIG, "cpu", "float32", batch=8)
    real, shapes = tight._step, []

    def small_memory(chunks, states):
        # No device here can run out on demand: this one holds five frames at a time.
        if sum(chunk.planes_T3HW.shape[0] for chunk in chunks) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        shapes.append([chunk.planes_T3HW.shape[0] for chunk in chunks])
        return real(chunks, states)

    monkeypatch.setattr(tight, "_step", small_memory)
    first = tight.launch([chunks[0] for chunks in clips], [None] * 3)
    for mine, theirs in zip(first.results(), expected, strict=True):
        np.testing.assert_array_equal(mine.mean_Cthw, theirs.mean_Cthw)
    assert shapes == [[5], [4]] * 3
    later = tight.encode([chunks[1] for chunks in clips], first.states)
    for mine, theirs in zip(later, second, strict=True):
        np.testing.assert_array_equal(mine.mean_Cthw, theirs)
    assert tight.largest_batch((True, 9, 32, 40)) == 1  # remembered
    assert tight.largest_batch((True, 9, 16, 16)) == 8


def test_chunk_that_never_fits_in_memory_is_an_error_that_names_its_shape(monkeypatch):
    encoder = Encoder(CONFIG, "cpu", "float32")

    def no_memory(chunks, states):
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    monkeypatch.setattr(encoder, "_step", no_memory)
    with pytest.raises(ConfigError, match=r"clips\.size: 32x40 does not fit"):
        encoder.encode(clip(0, 1), [None])


def test_build_batches_and_the_default_batch_depends_on_the_size(tmp_path):
    job = tiny_job(
        make_corpus(tmp_path / "in", shards=3),
        tmp_path / "out",
        "engine.batch=3",
        "engine.decoders=2",
        "clips.select=whole",
        "engine.credit=3",
    )
    seen = []
    original = Encoder.launch

    def counting(self, chunks, states):
        seen.append(len(chunks))
        if max(seen) == 1:
            time.sleep(0.3)  # a slow network: the decoders get ahead, however busy the machine
        return original(self, chunks, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "launch", counting)
        assert pipeline.encode(job).ok
    assert max(seen) > 1
    assert max(seen) <= 3
    encoder = Encoder(CONFIG, "cpu", "float32")
    assert encoder.largest_batch((True, 17, 256, 256)) == 1
    assert encoder.largest_batch((True, 17, 64, 64)) == 16


def test_overlapping_steps_give_the_same_rows(tmp_path, monkeypatch):
    """What CUDA does, on a CPU: results are taken one step late, states at once."""
    corpus = make_corpus(tmp_path / "in", shards=2)
    settled = pipeline.encode(tiny_job(corpus, tmp_path / "settled", "clips.select=whole", "engine.batch=2"))
    begin, flying = Encoder.__init__, []

    def overlapping(self, *arguments, **options):
        begin(self, *arguments, **options)
        self.overlaps = True

    def watched(self):
        flying.append(self._in_flight is not None)
        return step(self)

    step = EncodeLoop.step
    monkeypatch.setattr(Encoder, "__init__", overlapping)
    monkeypatch.setattr(EncodeLoop, "step", watched)
    report = pipeline.encode(tiny_job(corpus, tmp_path / "flying", "clips.select=whole", "engine.batch=2"))
    assert any(flying)
    assert report.ok
    assert report.counts == settled.counts
    assert rows(tmp_path / "flying") == rows(tmp_path / "settled")


def test_summary_names_the_step_sizes(tmp_path):
    report = pipeline.encode(tiny_job(make_corpus(tmp_path / "in", shards=1), tmp_path / "out", "engine.batch=1"))
    assert set(report.step_sizes.values()) == {1}
    shape = next(iter(report.step_sizes))
    assert f"1 x {shape}" in str(build_lines(report))


def test_invalid_names_checkpoints_and_devices_are_refused():
    with pytest.raises(ConfigError, match="leanvae-dim16"):
        known_spec(ModelConfig(name="nonesuch", untrained=0))
    assert known_spec(ModelConfig(name="leanvae", checkpoint="x.safetensors")) is None
    partial = {"ista_iter_num": 2}  # the checkpoint may have the rest
    assert known_spec(ModelConfig(name="leanvae", checkpoint="x.safetensors", config=partial)) is None
    assert known_spec(ModelConfig(name="diffusers", checkpoint="x.safetensors", config={"scaling_factor": 1})) is None
    assert known_spec(ModelConfig(name="leanvae", checkpoint="x.safetensors", config=TINY_NETWORK)) is not None
    with pytest.raises(ConfigError, match="missing: latent_dim"):
        known_spec(ModelConfig(name="leanvae", untrained=0, config=partial))
    with pytest.raises(CheckpointError, match="nowhere"):
        Encoder(ModelConfig(checkpoint="nowhere.safetensors"), "cpu", "float32")
    assert resolve_device("auto", "auto", cuda=True) == ("cuda", "bfloat16")
    assert resolve_device("auto", "auto", cuda=False) == ("cpu", "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_device_is_refused(tmp_path):
    job = tiny_job(make_corpus(tmp_path / "in", shards=1), tmp_path / "out", "model.device=cuda")
    with pytest.raises(ConfigError, match=r"model\.device"):
        pipeline.encode(job)


def test_missing_cuda_device_is_refused_by_a_private_ray_and_not_by_a_cluster_which_may_grow(tmp_path):
    for flags, private in (((), True), (("engine.address=10.0.0.1:6379",), False)):
        job = tiny_job(tmp_path, tmp_path / "out", "model.device=cuda", "engine.executor=ray", *flags)
        executor = Executor(job)
        executor._cluster = Cluster(local=private, cpus=4.0, gpus=0.0, nodes=1)
        if private:
            with pytest.raises(ConfigError, match=r"model\.device"):
                executor.resolve_device()
        else:
            assert executor.resolve_device()[0].startswith("cuda")


def test_unreachable_hub_is_named_in_the_error(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(name="leanvae", config=TINY_NETWORK, checkpoint="hf://owner/repo/file.ckpt")
    with pytest.raises(AccessError, match=r"hf://owner/repo/file\.ckpt") as caught:
        Encoder(config, "cpu", "float32")
    assert caught.value.exit_code == 2


def compile_errors():
    """What torch raises, and what the build then says."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InductorError

    another = "encode into another output with engine.compile=off"
    failed = "engine.compile: torch.compile failed"
    no_memory = "cc1plus: out of memory allocating 65536 bytes"
    return [
        (TorchDynamoException("g++: internal\ncompiler error"), f"{failed}: g++: internal compiler error; {another}"),
        (
            InductorError(CppCompileError(["g++", "-I/" + 500 * "x"], no_memory), None),
            f"{failed}: CppCompileError: {no_memory}; {another}",
        ),
        (
            InductorError(ImportError("/kernels/nu/x.main.so: file too short"), None),
            "engine.compile: a compiled kernel cannot be loaded: ImportError: /kernels/nu/x.main.so: file too short; delete the folder "
            "/kernels (TORCHINDUCTOR_CACHE_DIR) and run again",
        ),
    ]


def test_a_failure_of_the_compiler_ends_the_build_and_blames_neither_videos_nor_their_size(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kernels")
    encoder = Encoder(CONFIG, "cpu", "float32")
    for error, message in compile_errors():

        def fails(*given, error=error, **options):
            raise error

        monkeypatch.setattr(encoder._vae, "encode_planes", fails)
        with pytest.raises(BuildError) as caught:
            encoder.encode(clip(0, 1), [None])
        assert str(caught.value) == message
