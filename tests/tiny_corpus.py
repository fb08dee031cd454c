"""Corpora small enough to encode many times: real H.264 in real tars, a tiny LeanVAE with seeded random weights, rows to compare."""

import functools
import io
import json
import tarfile

import av
import numpy as np
import pyarrow.parquet as pq

from pipeline.config import EncodeJob, StorageConfig, build_job
from pipeline.ledger.receipts import Ledger
from pipeline.storage import open_store

TINY_NETWORK = {
    "embedding_dim": 32,
    "latent_dim": 4,
    "ista_iter_num": 2,
    "ista_layer_num": 2,
    "l_dim": 8,
    "h_dim": 24,
    "sep_num_layer": 2,
    "fusion_num_layer": 4,
}


@functools.cache
def video_bytes(frames: int, height: int = 64, width: int = 64, seed: int = 0, fps: int = 8) -> bytes:
    """A moving texture as H.264 in mp4."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (height * 2, width * 2, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": "8"}
        for n in range(frames):
            picture = np.ascontiguousarray(texture[n : n + height, 2 * n % width : 2 * n % width + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_tar(path, samples: dict[str, dict[str, bytes]]):
    """`{key: {extension: bytes}}` as a WebDataset shard with fixed times."""
    with tarfile.open(path, "w") as tar:
        for key, fields in samples.items():
            for extension, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def make_corpus(folder, shards: int = 3, samples: int = 3):
    """`shards` tars of `samples` videos of 5 to 29 frames, with captions and json; the last sample of each is too short."""
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        content = {}
        for n in range(samples):
            frames = 3 if n == samples - 1 else 9 + 4 * ((s + n) % 3)
            key = f"{s:03d}{n:03d}"
            content[key] = {
                "mp4": video_bytes(frames, seed=s * samples + n),
                "txt": f"clip {key}, größer".encode(),
                "json": json.dumps({"number": n}).encode(),
            }
        write_tar(folder / f"{s:06d}.tar", content)
    return folder


def tiny_job(inputs, output, *overrides: str, **flags) -> EncodeJob:
    """A job with the tiny network, inline, clips of five frames tiled over each video, a full-precision latent."""
    values = {
        "inputs": [str(inputs)] if not isinstance(inputs, list) else [str(item) for item in inputs],
        "output": str(output),
        "model.name": "leanvae",
        "model.config": TINY_NETWORK,
        "model.untrained": 0,
        "clips.frames": "5",
        "clips.size": "32x32",
        "clips.select": "tile",
        "write.dtype": "float32",
        "engine.executor": "inline",
        "engine.decoders": 1,  # each costs half a second to start; commands and tests of order have two
        "progress": "none",
        **flags,
    }
    return build_job(values, overrides=overrides)


def tiny_flags(*extra: str) -> list[str]:
    """The same as command-line arguments."""
    return [
        *("--model", "leanvae", "--untrained", "0", "--frames", "5", "--size", "32x32", "--clips", "tile"),
        *("--dtype", "float32", "--progress", "plain"),
        *("--set", f"model.config={json.dumps(TINY_NETWORK)}", "--set", "engine.decoders=2"),
        *extra,
    ]


def rows(output, storage: StorageConfig | None = None) -> dict[str, dict]:
    """Every row that receipts name, by id: what a reader of the output sees. Fails on a row that is there twice."""
    store = open_store(str(output), storage or StorageConfig())
    found: dict[str, dict] = {}
    for receipt in Ledger(store).all():
        for item in receipt.files:
            table = pq.read_table(io.BytesIO(store.read(item.key)))
            for row in table.to_pylist():
                assert row["id"] not in found, f"row {row['id']} is there twice"
                found[row["id"]] = row
    return found


def receipts(output, storage: StorageConfig | None = None) -> list:
    """All receipts of an output."""
    return list(Ledger(open_store(str(output), storage or StorageConfig())).all())
