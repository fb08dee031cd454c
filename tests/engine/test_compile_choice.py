"""Whether a build compiles its network: estimated once for an output, recorded there and followed; what contradicts it is refused."""

import importlib
import os
import re
import shutil
import tempfile
from dataclasses import replace

import pytest
import torch

from model import registry
from pipeline.encoder.compiling import _SAVED_CORE_S, _try_compiler, packed_bytes, prepare_compiler
from pipeline.encoder.environment import environment
from pipeline.engine.driver.compile_choice import choose_compile
from pipeline.errors import ConfigError, OutputError
from pipeline.format.layout import compile_key
from pipeline.records import Shard, SourceObject
from pipeline.storage.local import LocalStore
from tests.engine.attempts import context_of

SMALL, LARGE = 10, 1_000_000  # videos


def context(tmp_path, *overrides, **values):
    made = context_of(tmp_path, tmp_path / "out", *overrides)
    spec = {**made.spec, "network": "leanvae-dim16", **values.pop("spec", {})}
    return replace(made, spec=spec, **values)


def videos(number):
    return [
        Shard("files", "a", tuple(SourceObject(f"/{n}.mp4", 2_000_000, "e") for n in range(min(number, 100))))
    ] * max(1, number // 100)


def choose(plain, number=SMALL, *, store=None, of_receipts=(), cores=2.0, here=True):
    store = store or LocalStore(plain.job.output)
    return choose_compile(plain, store, of_receipts, videos(number), lambda: cores, encodes_here=here)


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.fixture(autouse=True)
def with_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "true")  # found; nothing is compiled here


def test_few_inputs_are_not_compiled_and_many_are(tmp_path):
    few, many = choose(context(tmp_path)), choose(context(tmp_path, "write.dtype=float16"), LARGE)
    assert (few.on, many.on) == (False, True)
    assert few.line == "compile: off, about 1,000 frames of 1 size are too few: it would take about 60 s and save 0 s"
    assert many.line.startswith(
        "compile: on, about 100,000,000 frames of 1 size: it takes about 60 s for each encoder and saves "
    )


def test_every_frame_size_is_compiled_so_that_many_buckets_need_more_inputs(tmp_path):
    enough = 500_000
    sizes = [f"{32 + 8 * n}x32" for n in range(24)]
    assert choose(context(tmp_path), enough).on
    assert "2 sizes" in choose(context(tmp_path, "clips.size=32x32,64x32"), enough).reason
    many = choose(context(tmp_path, f"clips.size={','.join(sizes[:8])}"), 100_000)
    assert not many.on
    assert "8 sizes are too few: it would take about 480 s" in many.reason
    too_many = choose(context(tmp_path, f"clips.size={','.join(sizes)}"), LARGE)
    assert not too_many.on
    assert "24 sizes: each size packs the encoder's weights twice, about 2.2 GB in each encoder" in too_many.reason
    assert choose(
        context(tmp_path, f"clips.size={','.join(sizes)}", "write.dtype=float16", compute_dtype="bfloat16"), LARGE * 10
    ).on
    assert "8 sizes" in choose(context(tmp_path, "clips.size=area:32x32"), enough).reason


def test_larger_networks_are_compiled_for_fewer_sizes(tmp_path):
    def of_sizes(number, network):
        sizes = ",".join(f"{32 + 8 * n}x32" for n in range(number))
        return choose(context(tmp_path, f"clips.size={sizes}", spec={"network": network}), LARGE * 10).reason

    assert "it takes about 360 s for each encoder" in of_sizes(2, "ivvae-z16-dim96")
    assert "about 2.4 GB in each encoder" in of_sizes(3, "ivvae-z16-dim96")
    assert "about 2.4 GB" not in of_sizes(2, "ivvae-z16-dim96")
    assert "in each encoder" not in of_sizes(3, "ivvae-z16")


@pytest.mark.parametrize("network", [name for name in registry.names() if registry.family_of(name).compiles])
def test_packed_weights_are_two_copies_of_the_encoders_parameters(network):
    assert packed_bytes(network, "float32") == pytest.approx(2 * 4 * floats_of_encoder(network), rel=0.05)
    assert packed_bytes(network, "bfloat16") == packed_bytes(network, "float32") // 2


def test_what_is_no_preset_counts_as_the_largest_preset_of_its_family():
    assert packed_bytes("leanvae", "float32") == packed_bytes("leanvae-wan22-dim48", "float32")
    assert packed_bytes("ivvae", "float32") == packed_bytes("ivvae-z16-dim96", "float32")
    assert packed_bytes("wfvae", "float32") == packed_bytes("wfvae2", "float32") >= packed_bytes("wfvae-l", "float32")
    assert 2 * 4 * floats_of_encoder("wfvae2") < packed_bytes("wfvae2", "float32")


@pytest.mark.parametrize("family", _SAVED_CORE_S)
def test_every_measured_family_has_a_size_without_a_preset(family):
    assert packed_bytes(family, "float32") > 0


def floats_of_encoder(network):
    family, config = registry.family_of(network), registry.complete(network, None)
    part = family.latent_part(config)
    empty = importlib.import_module(f"model.{family.name}.network").Network.empty(config)
    kept = (*part.mean, *part.logvar, *part.shared)
    return sum(tensor.numel() for name, tensor in empty.named_parameters() if name.startswith(kept))


def test_slower_sampling_gives_fewer_frames(tmp_path):
    assert "about 160 frames" in choose(context(tmp_path, "clips.fps=4")).reason


def test_more_cores_save_less_time(tmp_path):
    assert choose(context(tmp_path), LARGE, cores=2).on
    assert not choose(context(tmp_path, "write.dtype=float16"), LARGE, cores=4000).on


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"device": "cuda"}, "its gain on GPUs is not known yet"),
        ({"spec": {"chunking": "none"}}, "each length of its whole clips would be compiled"),
        ({"spec": {"network": "wan-2.1"}}, "wan-2.1 is a network of diffusers, which is not compiled"),
    ],
)
def test_auto_never_compiles_where_it_cannot_know_that_it_pays(tmp_path, values, reason):
    assert choose(context(tmp_path, **values), LARGE).line.startswith(f"compile: off, {reason}")


def test_auto_does_not_compile_a_family_that_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.delitem(_SAVED_CORE_S, "leanvae")
    assert choose(context(tmp_path), LARGE).line.startswith("compile: off, its gain was not measured yet")


def test_networks_of_diffusers_refuse_on(tmp_path):
    plain = context(tmp_path, "engine.compile=on", spec={"network": "wan-2.1"})
    with pytest.raises(ConfigError, match=r"engine\.compile: got on, and wan-2\.1 is a network of diffusers"):
        choose(plain)


def test_the_first_choice_holds_for_later_builds_of_other_sizes(tmp_path):
    plain = context(tmp_path)
    assert choose(plain, LARGE).on
    assert choose(plain, SMALL).line == "compile: on, as this output was begun"
    of_receipts = {plain.as_compiled().fingerprint}
    assert choose(plain, SMALL, of_receipts=of_receipts).line == "compile: on, as the latents of this output"
    other = context(tmp_path, "write.dtype=float16")
    assert not choose(other, SMALL).on, "other settings are other latents, with a choice of their own"
    assert choose(other, LARGE).line.startswith(
        "compile: off, as this output was begun; another output would be compiled, about 100,000,000 frames"
    )


@pytest.mark.parametrize(("first", "second"), [("on", "off"), ("off", "on")])
def test_another_explicit_choice_is_refused_and_both_are_named(tmp_path, first, second):
    asked = context(tmp_path, f"engine.compile={first}")
    assert choose(asked).line == f"compile: {first}, engine.compile={first}"
    other = context(tmp_path, f"engine.compile={second}")
    of_receipts = {(asked.as_compiled() if first == "on" else asked).fingerprint}
    with pytest.raises(
        ConfigError, match=f"{second} was asked for, and the latents of .* are made with {first}; the two differ"
    ):
        choose(other, of_receipts=of_receipts)
    assert choose(asked).on is choose(context(tmp_path)).on is (first == "on")


@pytest.mark.parametrize(("first", "second"), [("on", "off"), ("off", "on")])
def test_a_choice_without_latents_is_said_to_be_one_and_is_made_anew_once_its_record_is_deleted(
    tmp_path, monkeypatch, first, second
):
    asked, other = (context(tmp_path, f"engine.compile={choice}") for choice in (first, second))
    record = f"{asked.job.output}/{compile_key(asked.fingerprint)}"
    choose(asked)
    with pytest.raises(
        ConfigError,
        match=f"{second} was asked for, and .* was begun with {first}, and has no latents of these settings yet; the two differ in bits. "
        f"Leave engine.compile at auto to go on, or choose another output, or delete {re.escape(record)} if no other build is running",
    ):
        choose(other)
    if first == "on":
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(ConfigError, match=f"install no-such-compiler, or delete {re.escape(record)} if no other"):
            choose(context(tmp_path))
    os.unlink(record)
    assert choose(other).on is (second == "on")


def test_receipts_tell_where_the_record_is_missing(tmp_path):
    plain = context(tmp_path)
    assert not choose(plain, LARGE, of_receipts={plain.fingerprint}).on
    assert choose(plain, SMALL, of_receipts={plain.as_compiled().fingerprint}).on


class RacingStore(LocalStore):
    """An output in which another build records its choice just before this one."""

    def put_if_absent(self, key, data):
        super().put_if_absent(key, data.replace(b"true", b"false"))
        return super().put_if_absent(key, data)


def test_of_two_first_builds_at_once_the_second_follows_the_first(tmp_path):
    store = RacingStore(str(tmp_path / "out"))
    assert choose(context(tmp_path), LARGE, store=store).line.startswith("compile: off, as this output was begun")
    other = context(tmp_path, "write.dtype=float16", "engine.compile=on")
    with pytest.raises(ConfigError, match=r"on was asked for.* was begun with off"):
        choose(other, store=store)


def test_without_a_compiler_auto_is_off_and_on_is_refused(tmp_path, without_compiler):
    assert choose(context(tmp_path), LARGE).line == (
        "compile: off, no C++ compiler was found (no-such-compiler); install no-such-compiler"
    )
    asked = context(tmp_path, "engine.compile=on", "write.dtype=float16")
    with pytest.raises(ConfigError, match=r"engine\.compile: no C\+\+ compiler was found"):
        choose(asked)
    assert choose(asked, here=False).on, "encoders of a cluster look for themselves"


def test_a_compiler_that_fails_is_refused_before_the_output_is_begun_and_tried_again_by_the_next_build(
    tmp_path, monkeypatch
):
    compiler, full = tmp_path / "g++", tmp_path / "full"
    compiler.write_text(
        f"#!/bin/sh\n[ -e {full} ] || exit 0\necho 'In file x:' >&2\necho 'x.o: error: No space left on device' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    full.touch()
    monkeypatch.setenv("CXX", str(compiler))
    failure = f"engine.compile: the C++ compiler {compiler} does not work: x.o: error: No space left on device"
    auto, asked = context(tmp_path), context(tmp_path, "engine.compile=on", "write.dtype=float16")
    store = LocalStore(asked.job.output)
    with pytest.raises(ConfigError, match=re.escape(f"{failure}; compiling pays for these inputs")):
        choose(auto, LARGE)
    with pytest.raises(ConfigError, match=re.escape(failure)):
        choose(asked)
    assert not list(store.keys("_compile")), "what may pass decides nothing"
    assert not choose(context(tmp_path, "clips.fps=4")).on, "few inputs need no compiler"
    full.unlink()
    assert choose(auto, LARGE).on
    full.touch()
    assert choose(auto, SMALL).on, "a success is remembered"


def test_a_temporary_folder_that_cannot_be_written_refuses_compiling_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("true"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    _try_compiler.cache_clear()
    with pytest.raises(
        ConfigError, match=r"the C\+\+ compiler cannot be tried: temporary folder .*gone cannot be written"
    ):
        choose(context(tmp_path, "engine.compile=on"))


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_where_compiling_is_switched_off_auto_is_off_and_on_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    off = f"torch.compile is switched off by {variable}=1 in the environment; unset it"
    assert choose(context(tmp_path), LARGE).line == f"compile: off, {off}"
    with pytest.raises(ConfigError, match=off):
        choose(context(tmp_path, "engine.compile=on", "write.dtype=float16"))


def test_receipts_name_threads_and_what_the_user_changes_about_compiling(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    plain, compiled = environment("cpu"), environment("cpu", compiled=True)
    assert plain["threads"] == str(torch.get_num_threads())
    assert compiled == {**plain, "compiler": "TORCHINDUCTOR_MAX_AUTOTUNE=1"}
    assert "threads" not in environment("cuda")


def test_an_output_of_compiled_latents_needs_a_compiler(tmp_path, without_compiler):
    plain = context(tmp_path)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler was found .*; the latents of .* are made with on"):
        choose(plain, of_receipts={plain.as_compiled().fingerprint})


def test_a_foreign_record_is_refused(tmp_path):
    plain, store = context(tmp_path), LocalStore(str(tmp_path / "out"))
    store.write(compile_key(plain.fingerprint), b"nonsense")
    with pytest.raises(OutputError, match=r"is not a record of engine\.compile"):
        choose(plain)


def test_compiled_and_plain_latents_have_different_fingerprints(tmp_path):
    plain = context(tmp_path)
    compiled = plain.as_compiled()
    assert compiled.fingerprint != plain.fingerprint
    assert (plain.compiled, compiled.compiled) == (False, True)
    assert compiled.fingerprint_parts["encoder"] == compiled.identity == {**plain.identity, "compiled": True}


def test_a_folder_of_kernels_that_cannot_be_written_is_named_before_torch_looks_for_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with pytest.raises(ConfigError, match=r"compiled kernels cannot be written to .*/file/cache: .*Not a directory"):
        prepare_compiler("cpu", 1)
