"""What every process of a build must agree on: the job made definite, the clip rules, the fingerprint and the file metadata.

Enters: a validated `EncodeJob` and the identity of the network. Leaves: a picklable `BuildContext`. Same context, same latents.
"""

from __future__ import annotations

import platform
import secrets
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.format.layout import CURRENT
from pipeline.records import ClipRules, stable_hash

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.encoder import Network
    from pipeline.format.layout import Layout

# Version of Lathe's own pixel path (sampling, scaling, crop, colour). Raised whenever a stored value could change.
PIXELS = 2


@dataclass(frozen=True, slots=True)
class BuildContext:
    """A build, decided."""

    job: EncodeJob
    rules: ClipRules
    spec: dict[str, Any]  # LatentSpec.to_dict()
    identity: dict[str, Any]  # of the network: weights, configuration, numerics
    provenance: dict[str, Any]  # where the weights came from
    device: str
    compute_dtype: str
    chunk_frames: int  # job.engine.chunk_frames on the network's grid; 0: clips are encoded whole
    fingerprint_parts: dict[str, Any]
    fingerprint: str
    build: str  # random; names of this build's attempts start with it
    layout: Layout  # names of the output's objects

    def file_metadata(self) -> dict[str, Any]:
        """What a data file says of the build that made it. The writer adds what it knows: format, bucket, dtype, constants."""
        return {
            "spec": self.spec,
            "encoder": {**self.identity, "checkpoint": self.provenance},
            "fingerprint_parts": self.fingerprint_parts,
            "versions": versions(),
        }


def draw(
    job: EncodeJob, rules: ClipRules, network: Network, device: str, compute_dtype: str, layout: Layout = CURRENT
) -> BuildContext:
    """Puts a context together and takes its fingerprint: everything that can change a stored value, and nothing else."""
    spec = network.spec.to_dict()
    stride = network.spec.time_stride
    parts = {
        "encoder": network.identity,
        "compute_dtype": compute_dtype,
        "storage_dtype": job.write.dtype,
        "posterior": "moments" if job.write.moments else "mean",
        "pixels": PIXELS,
        "decoder": _decoder_version(),
        "clips": asdict(rules),
        "policies": {name: getattr(job.decode, name) for name in ("hdr", "interlaced", "damage", "untagged_matrix")},
        "variant": "base",
    }
    return BuildContext(
        job=job,
        rules=rules,
        spec=spec,
        identity=network.identity,
        provenance=network.provenance,
        device=device,
        compute_dtype=compute_dtype,
        chunk_frames=max(stride, job.engine.chunk_frames // stride * stride) if spec["chunking"] != "none" else 0,
        fingerprint_parts=parts,
        fingerprint=stable_hash(parts),
        build=secrets.token_hex(4),
        layout=layout,
    )


def _decoder_version() -> dict[str, str]:
    import av

    libraries = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    return {"av": av.__version__, **{name: libraries[name] for name in ("libavcodec", "libavformat", "libswscale")}}


@cache
def versions() -> dict[str, str]:
    """Lathe and the libraries that a stored value or a file's layout depends on, as installed in this process."""
    packages = {name: version(name) for name in ("lathe", "torch", "numpy", "pyarrow")}
    return {**packages, "python": platform.python_version(), **_decoder_version()}
