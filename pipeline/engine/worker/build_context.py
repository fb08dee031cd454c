"""`BuildContext`: settings that all processes of a build share, with the fingerprint and the metadata of data files.

Made of a validated `EncodeJob` and the identity of the network; picklable. The same context gives the same latents.
"""

from __future__ import annotations

import platform
import secrets
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.format.layout import CURRENT
from pipeline.format.stored import VERSIONS
from pipeline.records import ClipRules, stable_hash
from pipeline.video.clips import chunk_length

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.encoder import Network
    from pipeline.format.layout import Layout

# Version of Lathe's own pixel path (sampling, scaling, crop, colour). Raised whenever a stored value could change.
PIXELS = 3


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Settings of one build; nothing is left to defaults."""

    job: EncodeJob
    rules: ClipRules
    spec: dict[str, Any]  # LatentSpec.to_dict()
    identity: dict[str, Any]  # of the network: weights, configuration, numerics
    provenance: dict[str, Any]  # where the weights came from
    device: str
    compute_dtype: str
    chunk_frames: int  # per encode step after the first; see `clips.chunk_length`
    fingerprint_parts: dict[str, Any]
    fingerprint: str
    build: str  # random; names of this build's attempts start with it
    layout: Layout  # names of the output's objects

    @property
    def compiled(self) -> bool:
        """Whether steps of the network run through `torch.compile`."""
        return bool(self.identity.get("compiled", False))

    def as_compiled(self) -> BuildContext:
        """The same build with a compiled network: another fingerprint, since it gives other bits."""
        identity = {**self.identity, "compiled": True}
        parts = {**self.fingerprint_parts, "encoder": identity}
        return replace(self, identity=identity, fingerprint_parts=parts, fingerprint=stable_hash(parts))

    def file_metadata(self) -> dict[str, Any]:
        """Metadata of a data file about its build. The writer adds format, bucket, dtype and constants."""
        return {
            "spec": self.spec,
            "encoder": {**self.identity, "checkpoint": self.provenance},
            "fingerprint_parts": self.fingerprint_parts,
            "versions": versions(),
        }


def make_context(
    job: EncodeJob, rules: ClipRules, network: Network, device: str, compute_dtype: str, layout: Layout = CURRENT
) -> BuildContext:
    """Makes the context. Its fingerprint hashes everything that can change a stored value, and nothing else.

    Raises:
        ConfigError: `decode.device` is cuda, and the network runs on a CPU.
    """
    check_decode_device(job.decode.device, device)
    spec = network.spec.to_dict()
    chunked = spec["chunking"] != "none"
    parts = {
        "encoder": network.identity,
        "compute_dtype": compute_dtype,
        "storage_dtype": job.write.dtype,
        "posterior": "moments" if job.write.moments else "mean",
        "pixels": PIXELS,
        "decoder": _decoder_version(),
        "clips": rules.to_dict(),
        "policies": {name: getattr(job.decode, name) for name in ("hdr", "interlaced", "damage", "untagged_matrix")},
        "variant": ",".join(rules.variants),
    }
    if rules.images is not None:
        from pipeline.video.images import decoder_version

        parts["image_decoder"] = decoder_version()
    if job.write.compression != "none":
        parts["compression"] = job.write.compression
    if job.write.store:
        parts["store"] = {name: VERSIONS[name] for name in sorted(job.write.store)}
    if job.member_rule:
        parts["members"] = job.member_rule.to_dict()
    if job.decode.device == "cuda":  # the pixels are libav's, but damage inside a picture is not noticed
        from pipeline.video.decode.hardware import CODECS

        parts["nvdec"] = {"codecs": list(CODECS), "min_pixels": job.decode.nvdec_min_pixels}
    return BuildContext(
        job=job,
        rules=rules,
        spec=spec,
        identity=network.identity,
        provenance=network.provenance,
        device=device,
        compute_dtype=compute_dtype,
        chunk_frames=chunk_length(job.engine.chunk_frames, network.spec.time_stride, chunked=chunked),
        fingerprint_parts=parts,
        fingerprint=stable_hash(parts),
        build=secrets.token_hex(4),
        layout=layout,
    )


def check_decode_device(decode: str, network: str) -> None:
    """Raises ConfigError if videos are to be decoded on a GPU and the network runs on a CPU."""
    if decode == "cuda" and not network.startswith("cuda"):
        raise ConfigError(
            "decode.device: cuda decodes on the GPU of the encoder, but the network runs on the CPU (model.device, or no CUDA device was "
            "found); set decode.device=cpu, or run where there is a GPU"
        )


def _decoder_version() -> dict[str, str]:
    import av

    libraries = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    return {"av": av.__version__, **{name: libraries[name] for name in ("libavcodec", "libavformat", "libswscale")}}


@cache
def versions() -> dict[str, str]:
    """Versions of Lathe and of the libraries that stored values or a file's layout depend on, as this process has them."""
    packages = {name: version(name) for name in ("lathe", "torch", "numpy", "pyarrow")}
    return {**packages, "python": platform.python_version(), **_decoder_version()}
