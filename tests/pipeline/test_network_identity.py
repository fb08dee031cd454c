"""Which parts of a network decide which outputs are done (the encoder), and which are recorded (all)."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

import model
import pipeline
from pipeline.config import ModelConfig, StorageConfig
from pipeline.encoder import Encoder, identify
from pipeline.engine.worker.build_context import make_context
from pipeline.errors import CheckpointError
from pipeline.format.index import METADATA_KEY
from pipeline.look.preview import preview
from pipeline.look.showing import LatentDecoder
from tests.model.conftest import FIXTURES
from tests.model.diffusers_networks import TINY
from tests.tiny_corpus import TINY_NETWORK, make_corpus, receipts, tiny_job


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=1, samples=2)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint whose tensors of these beginnings are changed -> its path."""
    weights = model.load("leanvae", config=TINY_NETWORK, untrained=0).network.state_dict()

    def write(name, *beginnings):
        path = tmp_path / f"{name}.safetensors"
        changed = {
            key: t + 0.01 if beginnings and key.startswith(beginnings) else t.clone() for key, t in weights.items()
        }
        save_file(changed, path, {"config": json.dumps(TINY_NETWORK)})
        return str(path)

    return write


def job_of(corpus, output, checkpoint, **flags):
    return tiny_job(corpus, output, **{"model.checkpoint": checkpoint, "model.untrained": None, **flags})


def metadata_of(output, receipt):
    return json.loads(pq.read_schema(output / receipt.files[0].key).metadata[METADATA_KEY])["encoder"]


def test_new_decoder_weights_encode_nothing_again_and_new_encoder_weights_everything(corpus, checkpoint, tmp_path):
    output = tmp_path / "out"
    first = pipeline.encode(job_of(corpus, output, checkpoint("one")))
    tuned = pipeline.encode(
        job_of(corpus, output, checkpoint("tuned", "decoder.", "latent_bottleneck.Q", "std_layer."))
    )
    assert tuned.fingerprint == first.fingerprint
    assert (tuned.shards_before, tuned.shards_done) == (1, 0)
    assert len(receipts(output)) == 1
    other = pipeline.encode(job_of(corpus, output, checkpoint("other", "encoder.fusion_layer.")))
    assert other.fingerprint != first.fingerprint
    assert (other.shards_before, other.shards_done) == (0, 1)


def test_the_log_variance_head_counts_where_moments_are_stored(corpus, checkpoint, tmp_path):
    output, moments = tmp_path / "out", "write.moments=true"
    fingerprints = [
        pipeline.encode(
            tiny_job(corpus, output, moments, **{"model.checkpoint": path, "model.untrained": None})
        ).fingerprint
        for path in (checkpoint("one"), checkpoint("tuned", "decoder."), checkpoint("head", "std_layer."))
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_data_files_name_the_encoder_and_the_whole_network(corpus, checkpoint, tmp_path):
    path, output = checkpoint("one"), tmp_path / "out"
    pipeline.encode(job_of(corpus, output, path))
    (receipt,) = receipts(output)
    recorded = metadata_of(output, receipt)
    vae = model.load("leanvae", path)
    assert recorded["latent_weights_sha256"] == vae.sha256.mean
    assert "ista_iter_num" not in recorded["config"]
    assert recorded["checkpoint"]["weights_sha256"] == vae.sha256.all
    assert recorded["checkpoint"]["config"] == json.loads(json.dumps(vae.config))
    assert recorded["checkpoint"]["uri"] == path
    assert "weights_sha256" not in receipt.fingerprint_parts["encoder"]


@pytest.mark.parametrize("moments", [False, True])
def test_an_encoder_has_the_identity_the_driver_read_without_one(checkpoint, moments, monkeypatch):
    config = ModelConfig(name="leanvae", checkpoint=checkpoint("one"))
    network = Encoder(config, "cpu", "float32", moments=moments).network()
    monkeypatch.setattr("model.leanvae.vae.LeanVAE.__init__", None)  # no network is built from here on
    assert identify(config, moments=moments) == network
    assert (identify(config, moments=not moments).identity == network.identity) is False


def test_decoder_weights_are_not_in_the_fingerprint(corpus, checkpoint, tmp_path):
    from pipeline.engine.driver.encode import _rules

    job = job_of(corpus, tmp_path / "out", checkpoint("one"))
    one, tuned = (
        identify(ModelConfig(name="leanvae", checkpoint=checkpoint(name, *changed)))
        for name, changed in (("one", ()), ("tuned", ("decoder.",)))
    )
    assert one.provenance["weights_sha256"] != tuned.provenance["weights_sha256"]
    prints = {make_context(job, _rules(job, found.spec), found, "cpu", "float32").fingerprint for found in (one, tuned)}
    assert len(prints) == 1


def test_unreadable_checkpoint_is_refused_as_in_loading(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    for path in (tmp_path / "w.safetensors", tmp_path / "absent.safetensors", tmp_path / ("long" * 100)):
        with pytest.raises(CheckpointError, match="model: "):
            identify(ModelConfig(name="wfvae-s", checkpoint=str(path)))


@pytest.mark.parametrize("moments", ["write.moments=true", "write.moments=false"])
def test_preview_accepts_other_decoder_weights_with_a_notice_and_refuses_other_encoders(
    corpus, checkpoint, tmp_path, moments
):
    output, one, tuned = tmp_path / "out", checkpoint("one"), checkpoint("tuned", "decoder.")
    pipeline.encode(tiny_job(corpus, output, moments, **{"model.checkpoint": one, "model.untrained": None}))
    same = preview(str(output), StorageConfig(), clips=1)
    other = preview(str(output), StorageConfig(), clips=1, checkpoint=tuned)
    assert same["notices"] == []
    (notice,) = other["notices"]
    assert "another decoder" in notice
    assert other["network"]["weights_sha256"] == model.load("leanvae", tuned).sha256.all
    assert other["clips"][0]["psnr"] != same["clips"][0]["psnr"]
    wrong = checkpoint("wrong", "encoder.")
    with pytest.raises(CheckpointError, match=r"wrong\.safetensors are not those the latents were made with"):
        preview(str(output), StorageConfig(), clips=1, checkpoint=wrong)


@pytest.mark.parametrize(
    ("family", "config", "other"),
    [
        ("leanvae", TINY_NETWORK, {"ista_iter_num": 3}),
        ("wfvae", json.loads((FIXTURES / "wfvae-tiny.json").read_text())["config"], {"decoder_num_resblocks": 1}),
        ("diffusers", TINY["wan-2.1"], {"decoder_base_dim": 16}),
    ],
)
def test_preview_accepts_a_decoder_with_a_configuration_of_its_own(family, config, other, tmp_path):
    found = identify(ModelConfig(name=family, config=config, untrained=0))
    vae = model.load(family, config={**config, **other}, untrained=0)
    weights = {key: value.detach().clone() for key, value in vae._module().state_dict().items()}
    save_file(weights, tmp_path / "replaced.safetensors", {"config": json.dumps({**config, **other})})
    encoder = {**found.identity, "checkpoint": found.provenance}
    screen = LatentDecoder(encoder, str(tmp_path / "replaced.safetensors"), "cpu")
    assert screen.vae.weights_sha256 == vae.weights_sha256
    assert screen.vae.config == vae.config
    assert "another decoder" in screen.notices[0]
