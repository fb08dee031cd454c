"""`hf://` with the real client library, against a local server that implements the hub's file protocol."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file

import model
from model import checkpoint
from model.checkpoint import _from_hub
from model.registry import complete
from pipeline.config import ModelConfig
from pipeline.encoder import identify
from pipeline.errors import AccessError, CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves GET and HEAD of /{repo}/resolve/{revision}/{file} with the hub's headers and error codes."""

    files: dict[str, bytes]
    repo = "someone/vae"
    gated = "someone/gated"
    broken = "someone/broken"
    half_broken = "someone/half"  # knows the file but does not hand it out

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        owner, name, _, revision, path = self.path.lstrip("/").split("/", 4)
        repo = f"{owner}/{name}"
        if repo == self.gated:
            return self._refuse(403, "GatedRepo")
        if repo == self.broken or (repo == self.half_broken and body):
            return self._refuse(400, "")
        if repo == self.half_broken:
            repo = self.repo
        if repo != self.repo:
            return self._refuse(401, "RepoNotFound")
        if revision not in ("main", "v1"):
            return self._refuse(404, "RevisionNotFound")
        if path not in self.files:
            return self._refuse(404, "EntryNotFound")
        content = self.files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Suppresses log output."""


@pytest.fixture
def hub(golden, tmp_path, monkeypatch):
    official = io.BytesIO()
    torch.save({"args": argparse.Namespace(**golden.config), "state_dict": golden.weights}, official)
    bare = safetensors_bytes(golden.weights)
    handler = type(
        "Shelf",
        (Hub,),
        {
            "files": {
                "LeanVAE.ckpt": official.getvalue(),
                "tiny/model.safetensors": bare,
                "tiny/config.json": json.dumps(golden.config).encode(),
                "alone/model.safetensors": bare,
            }
        },
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        yield server


@pytest.mark.parametrize("uri", ["hf://someone/vae/LeanVAE.ckpt", "hf://someone/vae/LeanVAE.ckpt@v1"])
def test_a_hub_file_loads(hub, vae, uri):
    loaded = model.load("leanvae", uri)
    assert loaded.weights_sha256 == vae.weights_sha256
    assert loaded.checkpoint.uri == uri


def test_config_json_beside_hub_weights_is_used(hub, golden, vae):
    assert model.load("leanvae", "hf://someone/vae/tiny/model.safetensors").weights_sha256 == vae.weights_sha256
    with pytest.raises(ValueError, match="needs a configuration"):
        model.load("leanvae", "hf://someone/vae/alone/model.safetensors")
    loaded = model.load("leanvae", "hf://someone/vae/alone/model.safetensors", config=golden.config)
    assert loaded.weights_sha256 == vae.weights_sha256


def test_a_partial_configuration_overrides_that_beside_the_weights(hub, golden, tmp_path):
    save_file(golden.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**golden.config, "value_range": [-1.0, 1.0]}))
    hub.RequestHandlerClass.files["tiny/config.json"] = (tmp_path / "config.json").read_bytes()
    for uri in ("hf://someone/vae/tiny/model.safetensors", str(tmp_path)):
        found = model.identify("leanvae", uri, {"ista_layer_num": golden.config["ista_layer_num"]})
        assert found.config == {**complete("leanvae", golden.config), "value_range": [-1.0, 1.0]}
        assert model.identify("leanvae", uri, {"value_range": [-0.5, 0.5]}).config["value_range"] == [-0.5, 0.5]


def test_a_whole_configuration_asks_the_hub_for_the_weights_only(hub, golden, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "_from_hub", lambda *parts: asked.append(parts) or _from_hub(*parts))
    model.identify("leanvae", "hf://someone/vae/alone/model.safetensors", complete("leanvae", golden.config))
    assert asked == [("someone/vae", "alone/model.safetensors", None)]


def test_only_refusals_of_the_hub_are_errors_of_access(hub, golden):
    phi = golden.weights["latent_bottleneck.phi"].to(torch.float8_e4m3fn)
    narrow = {**golden.weights, "latent_bottleneck.phi": phi}
    hub.RequestHandlerClass.files["alone/model.safetensors"] = safetensors_bytes(narrow)
    for uri, error in (
        ("hf://someone/vae/alone/model.safetensors", CheckpointError),
        ("hf://someone/broken/w.ckpt", AccessError),
    ):
        with pytest.raises(error, match="model"):
            identify(ModelConfig(name="leanvae", checkpoint=uri, config=golden.config))


@pytest.mark.parametrize(
    ("uri", "error", "words"),
    [
        ("hf://someone/vae/other.ckpt", FileNotFoundError, "no such file or revision"),
        ("hf://someone/vae/LeanVAE.ckpt@v9", FileNotFoundError, "no such file or revision"),
        ("hf://nobody/vae/LeanVAE.ckpt", FileNotFoundError, "no such repository, or it is private"),
        ("hf://someone/gated/LeanVAE.ckpt", ConnectionError, "access is restricted"),
        ("hf://someone/broken/LeanVAE.ckpt", ConnectionError, "the hub answered 400"),
        ("hf://someone/half/LeanVAE.ckpt", ConnectionError, "the hub answered 400"),
        ("hf://someone/vae", ValueError, r"expected hf://owner/repo/file\[@revision\]"),
    ],
)
def test_refusals_of_the_hub_have_clear_errors(hub, uri, error, words):
    with pytest.raises(error, match=words):
        model.load("leanvae", uri)


def test_an_unreachable_hub_is_an_error(hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's own back-off: half a minute
    with pytest.raises(ConnectionError, match="could not be reached"):
        model.load("leanvae", "hf://someone/vae/LeanVAE.ckpt")
