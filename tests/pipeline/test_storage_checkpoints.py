"""Checkpoints from a real S3 server: downloaded once, again if replaced, never partially."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import save

import model
from pipeline.config import ModelConfig
from pipeline.encoder import identify
from pipeline.errors import AccessError, CheckpointError
from pipeline.storage import open_store
from pipeline.storage.checkpoints import cache_folder, fetch
from tests.faulty_proxy import Fault, FaultyProxy, always
from tests.model.diffusers_networks import TINY
from tests.tiny_corpus import TINY_NETWORK

if TYPE_CHECKING:
    from tests.conftest import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_checkpoint_is_downloaded_once(s3: S3Server, cache: Path) -> None:
    weights = os.urandom(3_000_000)
    open_store(s3.root, s3.config()).write("models/lean vae.ckpt", weights)
    with FaultyProxy(s3.address, lambda *_: None) as proxy:
        config = s3.config(endpoint_url=proxy.endpoint)
        path = fetch(f"{s3.root}/models/lean vae.ckpt", config)
        assert Path(path).read_bytes() == weights
        assert Path(path).name == "lean_vae.ckpt"
        before = [method for method, _ in proxy.requests].count("GET")
        assert fetch(f"{s3.root}/models/lean vae.ckpt", config) == path
        assert [method for method, _ in proxy.requests].count("GET") == before
    assert files(cache) == [Path(path)]


@pytest.mark.parametrize(("family", "config"), [("leanvae", TINY_NETWORK), ("diffusers", TINY["sd"])])
def test_the_configuration_beside_the_weights_is_used(s3: S3Server, family: str, config: dict[str, Any]) -> None:
    store, uri = open_store(s3.root, s3.config()), f"{s3.root}/vae/w.safetensors"
    vae = model.load(family, config=config, untrained=0)
    store.write("vae/w.safetensors", save({key: value.clone() for key, value in vae._module().state_dict().items()}))
    with pytest.raises(CheckpointError, match="configuration"):
        identify(ModelConfig(name=family, checkpoint=uri))
    store.write("vae/config.json", json.dumps(config).encode())
    found = identify(ModelConfig(name=family, checkpoint=uri))
    assert found.provenance["weights_sha256"] == vae.weights_sha256
    assert found.provenance["config"] == vae.config
    key, value = ("value_range", [-1.0, 1.0]) if family == "leanvae" else ("scaling_factor", 2.0)
    partial = identify(ModelConfig(name=family, checkpoint=uri, config={key: value}))
    assert partial.provenance["config"] == {**vae.config, key: value}
    store.write("vae/config.json", json.dumps({**config, key: value}).encode())
    assert identify(ModelConfig(name=family, checkpoint=uri)).identity == partial.identity, "read again when replaced"


def test_the_entry_point_needs_only_the_uri(s3: S3Server) -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="lathe.checkpoint_fetchers", name="s3")
    open_store(s3.root, s3.config()).write("x.safetensors", b"1")
    assert Path(entry.load()(f"{s3.root}/x.safetensors")).read_bytes() == b"1"


def test_a_replaced_checkpoint_is_another_file(s3: S3Server) -> None:
    store = open_store(s3.root, s3.config())
    store.write("x.ckpt", b"one")
    first = fetch(f"{s3.root}/x.ckpt")
    store.write("x.ckpt", b"two")
    second = fetch(f"{s3.root}/x.ckpt")
    assert (Path(first).read_bytes(), Path(second).read_bytes()) == (b"one", b"two")


def test_simultaneous_processes_share_one_download(s3: S3Server, cache: Path) -> None:
    open_store(s3.root, s3.config()).write("x.ckpt", os.urandom(2_000_000))
    code = (
        "import sys; from pipeline.storage.checkpoints import fetch; from pipeline.config import StorageConfig\n"
        "print(fetch(sys.argv[1], StorageConfig(endpoint_url=sys.argv[2])))"
    )
    with FaultyProxy(s3.address, lambda *_: None) as proxy:
        command = [sys.executable, "-c", code, f"{s3.root}/x.ckpt", proxy.endpoint]
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
        paths = {run.communicate()[0] for run in runs}
        assert [method for method, _ in proxy.requests].count("GET") == 1
    assert len(paths) == 1
    assert len(files(cache)) == 1


def test_a_broken_download_leaves_nothing(s3: S3Server, cache: Path) -> None:
    open_store(s3.root, s3.config()).write("x.ckpt", os.urandom(2_000_000))
    with FaultyProxy(s3.address, always(Fault("cut", after_bytes=0))) as proxy:
        from pipeline.errors import StorageUnavailable

        with pytest.raises(StorageUnavailable):
            fetch(f"{s3.root}/x.ckpt", s3.config(endpoint_url=proxy.endpoint, max_attempts=2))
    assert files(cache) == []
    (damaged,) = [Path(fetch(f"{s3.root}/x.ckpt"))]
    damaged.write_bytes(b"short")  # a cache that lost bytes is noticed by its size
    assert Path(fetch(f"{s3.root}/x.ckpt")).stat().st_size == 2_000_000


def test_errors_that_a_person_must_fix_name_the_cause(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no/such\.ckpt does not exist"):
        fetch(f"{s3.root}/no/such.ckpt")
    with pytest.raises(CheckpointError, match=r"no/such\.ckpt does not exist"):
        identify(ModelConfig(name="leanvae-dim4", checkpoint=f"{s3.root}/no/such.ckpt"))
    with pytest.raises((AccessError, FileNotFoundError), match="no-such-bucket"):
        fetch("s3://no-such-bucket/x.ckpt")
    open_store(s3.root, s3.config()).write("x.ckpt", b"1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="LATHE_CACHE"):
        fetch(f"{s3.root}/x.ckpt")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LATHE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "lathe"
