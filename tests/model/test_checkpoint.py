"""Checkpoint loading: every layout gives the same network, nothing in a file runs, keys are strict, schemes have fetchers."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import model
from model import checkpoint
from model.weights import check_finite


class RunsCode:
    """Unpickling this touches a file, as a hostile checkpoint could."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def official(golden, **options):
    return {"args": argparse.Namespace(**golden.config, lr=5e-5, **options), "state_dict": golden.weights}


def training(golden):
    weights = {f"autoencoder.{key}": t for key, t in golden.weights.items()}
    weights["gan_loss.discriminator.0.weight"] = torch.zeros(4)
    weights["perceptual_model.net.slice1.0.weight"] = torch.zeros(4)
    return {
        "epoch": 3,
        "global_step": 700_000,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.5, 0.9)}]}],
        "lr_schedulers": [{"last_epoch": 3}],
    }


def save(tmp_path, content, name="weights.ckpt", **how) -> str:
    path = tmp_path / name
    torch.save(content, path, **how)
    return str(path)


def test_official_layout_contains_the_configuration(golden, tmp_path):
    path = save(tmp_path, official(golden))
    loaded = model.load("leanvae", path)
    golden.check("out/A_z", loaded.encode(golden["in/A"])[0].mean)
    golden.check("out/B_dec", loaded.decode(golden["out/B_z"])[0])
    info = loaded.checkpoint
    assert (info.uri, info.layout, info.num_bytes) == (path, "official", Path(path).stat().st_size)
    assert info.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert json.loads(json.dumps(info.to_dict()))["layout"] == "official"


def test_old_file_format_loads(golden, tmp_path):
    path = save(tmp_path, official(golden), _use_new_zipfile_serialization=False)
    golden.check("out/B_z", model.load("leanvae", path).encode(golden["in/B"])[0].mean)


def test_training_layout_drops_prefix_and_losses_and_needs_a_configuration(golden, tmp_path):
    path = save(tmp_path, training(golden))
    with pytest.raises(ValueError, match="needs a configuration"):
        model.load("leanvae", path)
    loaded = model.load("leanvae", path, config=golden.config)
    golden.check("out/A_z", loaded.encode(golden["in/A"])[0].mean)
    assert loaded.checkpoint.layout == "training"


def test_the_same_weights_have_the_same_hash_in_every_container(golden, vae, tmp_path):
    pt = {"format": "pt"}
    save_file(golden.weights, tmp_path / "m.safetensors", metadata={**pt, "config": json.dumps(golden.config)})
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(golden.weights, folder / "model.safetensors", metadata=pt)
    (folder / "config.json").write_text(json.dumps({**golden.config, "_class_name": "LeanVAE"}))
    paths = {
        save(tmp_path, official(golden), "official.ckpt"): None,
        save(tmp_path, {"args": golden.config, "state_dict": golden.weights}, "dict-args.ckpt"): None,
        save(tmp_path, training(golden), "training.ckpt"): golden.config,
        save(tmp_path, golden.weights, "plain.pth"): golden.config,
        str(tmp_path / "m.safetensors"): None,
        f"file://{tmp_path}/m.safetensors": None,
        str(folder / "model.safetensors"): None,
        str(folder): None,
    }
    for path, config in paths.items():
        assert model.load("leanvae", path, config=config).weights_sha256 == vae.weights_sha256, path


def test_a_file_with_another_configuration_is_refused_for_a_preset(golden, tmp_path):
    path = save(tmp_path, official(golden))
    with pytest.raises(ValueError, match=r"not leanvae-dim16.*latent_dim is 4, not 16.*family name"):
        model.load("leanvae-dim16", path)
    bare = save(tmp_path, golden.weights, "bare.pth")
    with pytest.raises(ValueError, match=r"do not fit leanvae-dim4: .*misshapen: .*expected \(4, 512\)"):
        model.load("leanvae-dim4", bare)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_not_run(golden, tmp_path, zipped):
    trap = tmp_path / "trap"
    path = save(tmp_path, {**official(golden), "extra": RunsCode(trap)}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"full unpickling.*(posix|nt|os)\.mkdir.*lathe convert-checkpoint .*--trust-pickle"
    ):
        model.load("leanvae", path)
    with pytest.raises(ValueError, match="full unpickling"):
        checkpoint.convert(path, tmp_path / "out.safetensors")
    assert not trap.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_pickled_classes_are_refused_by_name(golden, tmp_path):
    path = save(tmp_path, official(golden, when=datetime.timedelta(1)))
    with pytest.raises(ValueError, match=r"refers to datetime\.timedelta"):
        model.load("leanvae", path)


def test_convert_with_trust_writes_a_safe_copy(golden, vae, tmp_path):
    trap = tmp_path / "trap"
    path = save(tmp_path, {**official(golden, when=datetime.timedelta(1)), "extra": RunsCode(trap)})
    out = tmp_path / "safe.safetensors"
    info = checkpoint.convert(path, out, trust_pickle=True)
    assert trap.is_dir()  # that is what trust means
    assert info.layout == "official"
    converted = model.load("leanvae", str(out))
    assert converted.weights_sha256 == vae.weights_sha256
    assert converted.config == vae.config
    assert [item.name for item in tmp_path.iterdir() if "partial" in item.name] == []
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        checkpoint.convert(path, tmp_path / "out.pt")


def test_convert_can_store_float16(golden, vae, tmp_path):
    path, out = save(tmp_path, official(golden)), tmp_path / "half.safetensors"
    checkpoint.convert(path, out, dtype="float16")
    found = checkpoint.read(str(out)).weights
    assert {value.dtype for value in found.values()} == {torch.float16}
    whole = {key: value.clone() for key, value in checkpoint.read(str(path)).weights.items()}  # of a mapped file
    assert all(torch.equal(found[key], value.half()) for key, value in whole.items())
    assert model.load("leanvae", str(out)).weights_sha256 != vae.weights_sha256
    with pytest.raises(ValueError, match=r"dtype must be one of .*float16.*; got 'int8'"):
        checkpoint.convert(path, out, dtype="int8")
    with pytest.raises(FileNotFoundError, match=r"folder of .* does not exist; create it, or give another"):
        checkpoint.convert(path, tmp_path / "none" / "out.safetensors")
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OSError, match=r"taken.safetensors cannot be written .*; give another path"):
        checkpoint.convert(path, tmp_path / "taken.safetensors")
    assert not list(tmp_path.glob("*.partial"))
    huge = {**whole, next(iter(whole)): torch.full_like(next(iter(whole.values())), 1e6)}
    with pytest.raises(ValueError, match=r"as torch.float16"):
        checkpoint.convert(save(tmp_path, {"state_dict": huge}), out, dtype="float16")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_convert_keeps_counters_of_norms_and_refuses_nan(tmp_path, dtype):
    counted = {"bn.running_var": torch.ones(2), "bn.num_batches_tracked": torch.tensor(3)}
    out = tmp_path / "out.safetensors"
    checkpoint.convert(save(tmp_path, counted), out, dtype=dtype)
    assert checkpoint.read(str(out)).weights["bn.num_batches_tracked"].equal(torch.tensor(3))
    broken = save(tmp_path, {**counted, "bn.running_var": torch.full((2,), torch.nan)})
    with pytest.raises(ValueError, match="NaN or infinity"):
        checkpoint.convert(broken, out, dtype=dtype)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors"])
def test_damaged_files_are_refused(golden, tmp_path, name, keep):
    if name.endswith("ckpt"):
        save(tmp_path, official(golden), name)
    else:
        save_file(golden.weights, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(ValueError, match="not a readable"):
        model.load("leanvae", str(tmp_path / name), config=golden.config)


def test_a_text_file_is_not_a_checkpoint(golden, tmp_path):
    (tmp_path / "w.ckpt").write_text("<!doctype html><title>404</title>")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        model.load("leanvae", str(tmp_path / "w.ckpt"), config=golden.config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list; expected a dict"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"step": 3, "model": {"a": torch.zeros(1)}}, "not tensors: step, model"),
        ({"args": "x", "state_dict": {"a": torch.zeros(1)}}, "args must be a dict or argparse.Namespace, got str"),
        ({"state_dict": None}, "holds no tensors: got a NoneType"),
        ({"state_dict": 3}, "holds no tensors: got a int"),
        ({"ema_state_dict": 3, "state_dict": {"a": torch.zeros(1)}}, "holds no tensors: got a int"),
        ({"ema_state_dict": torch.zeros(2)}, "holds no tensors: got a Tensor"),
        ({"state_dict": {0: torch.zeros(1)}}, "keys that are not names: 0;"),
        ({0: torch.zeros(1), "b": torch.zeros(1)}, "keys that are not names: 0;"),
        ({"a": torch.ones(2, 2).to_sparse()}, r"sparse or without values \(meta\): a;"),
        ({"a": torch.zeros(2, device="meta")}, r"sparse or without values \(meta\): a;"),
    ],
)
def test_unknown_layouts_are_refused(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        model.load("leanvae-dim4", save(tmp_path, content))


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe"])
def test_a_config_json_that_is_not_an_object_is_refused(golden, tmp_path, text):
    save_file(golden.weights, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"configuration in .*config\.json"):
        model.load("leanvae", str(tmp_path / "w.safetensors"))


def test_missing_and_extra_keys_are_refused_and_listed(golden):
    renamed = {key.replace("encoder.", "enc."): t for key, t in golden.weights.items()}
    moved = [key for key in golden.weights if key.startswith("encoder.")]
    with pytest.raises(ValueError, match="do not fit leanvae") as caught:
        model.from_state_dict("leanvae", golden.config, renamed)
    message = str(caught.value)
    assert f"{len(moved)} missing: " in message
    assert f"{len(moved)} extra: " in message
    assert message.count("encoder.") == 10
    assert message.count(f"and {len(moved) - 10} more") == 2

    one_less = {key: t for key, t in golden.weights.items() if key != "std_layer.bias"}
    with pytest.raises(ValueError, match=r"1 missing: std_layer\.bias"):
        model.from_state_dict("leanvae", golden.config, one_less)
    reshaped = {**golden.weights, "std_layer.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"1 misshapen: std_layer.bias is \(5,\), expected \(4,\)"):
        model.from_state_dict("leanvae", golden.config, reshaped)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(golden, value):
    weights = {key: t.clone() for key, t in golden.weights.items()}
    weights["latent_bottleneck.phi"][0, 3] = value
    with pytest.raises(ValueError, match=r"1 tensors with NaN or infinity: latent_bottleneck\.phi"):
        model.from_state_dict("leanvae", golden.config, weights)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_other_types_are_refused(golden, dtype):
    weights = {**golden.weights, "latent_bottleneck.phi": golden.weights["latent_bottleneck.phi"].to(dtype)}
    with pytest.raises(ValueError, match=rf"floating point.*latent_bottleneck.phi \({dtype}\)"):
        model.from_state_dict("leanvae", golden.config, weights)


def test_the_network_shares_no_memory_with_the_caller(golden):
    weights = {key: t.clone() for key, t in golden.weights.items()}
    loaded = model.from_state_dict("leanvae", golden.config, weights)
    for tensor in weights.values():
        tensor.zero_()
    golden.check("out/B_z", loaded.encode(golden["in/B"])[0].mean)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing\.ckpt"):
        model.load("leanvae-dim4", str(tmp_path / "missing.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        model.load("leanvae-dim4", str(tmp_path))
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds 2 \*\.ckpt files"):
        model.load("leanvae-dim4", str(tmp_path))


def test_unknown_schemes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"no fetcher for ftp://; expected a local path, hf://"):
        model.load("leanvae-dim4", "ftp://host/weights.ckpt")


def test_a_registered_fetcher_is_used_for_its_scheme(golden, vae, tmp_path, monkeypatch):
    """An installed distribution with an entry point, like the package's own for object stores."""
    site = tmp_path / "site"
    meta = site / "shelf_fetcher-1.0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf-fetcher\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[{checkpoint.FETCHERS}]\nshelf = shelf_fetcher:fetch\n")
    stored = save(tmp_path, official(golden))
    (site / "shelf_fetcher.py").write_text(
        f"def fetch(uri):\n    assert uri == 'shelf://vae/weights.ckpt', uri\n    return {stored!r}\n"
    )
    monkeypatch.syspath_prepend(site)
    loaded = model.load("leanvae", "shelf://vae/weights.ckpt")
    assert loaded.weights_sha256 == vae.weights_sha256
    assert loaded.checkpoint.uri == "shelf://vae/weights.ckpt"
    shutil.rmtree(meta)
    with pytest.raises(ValueError, match="no fetcher for shelf"):
        model.load("leanvae", "shelf://vae/weights.ckpt")


def test_a_registered_fetcher_gives_the_configuration_beside_the_weights(golden, vae, tmp_path, monkeypatch):
    asked = []

    def fetched(uri):
        asked.append(uri)
        if uri not in {"shelf://vae/w.safetensors", "shelf://vae/config.json", "shelf://alone/w.safetensors"}:
            raise FileNotFoundError(uri)
        return tmp_path / uri.partition("://")[2]

    entry = argparse.Namespace(name="shelf", load=lambda: fetched)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group, name=None: [entry])
    for folder in ("vae", "alone"):
        (tmp_path / folder).mkdir()
        save_file(golden.weights, tmp_path / folder / "w.safetensors")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(golden.config))
    loaded = model.load("leanvae", "shelf://vae/w.safetensors")
    assert loaded.config == vae.config
    with pytest.raises(ValueError, match=r"shelf://alone/w.safetensors contains none and has no config.json beside it"):
        model.identify("leanvae", "shelf://alone/w.safetensors")
    asked.clear()
    assert model.identify("leanvae", "shelf://alone/w.safetensors", vae.config).sha256 == vae.sha256
    assert asked == ["shelf://alone/w.safetensors"], "a whole configuration needs no other"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_single_non_finite_value_is_found(value, dtype):
    good = {
        "a": torch.randn(3, 50).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "one": torch.tensor(2.0).to(dtype),
    }
    check_finite("net", good)
    for key, place in (("a", (0, 0)), ("a", (1, 27)), ("a", (2, 49)), ("one", ())):
        broken = good[key].clone()
        broken[place] = value
        with pytest.raises(ValueError, match=f"1 tensors with NaN or infinity: {key}"):
            check_finite("net", {**good, key: broken})
    check_finite("net", {"largest": torch.full((2,), torch.finfo(dtype).max, dtype=dtype)})
