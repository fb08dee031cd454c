"""Size and loss of each storage type on real latents, and the speed of its codec on one core.

    python -m benchmarks.storage_types [--size 256x256] [--frames 17] [--clips 0]

Encodes the sample corpus once with the packaged network, latents as float32. Each clip is then stored and read back by `format.codec`
in every type. `rms`: root mean square of the error as a fraction of that of the latents; PSNR of the decoded video against that of
float16 latents, and against the source; worst: the clip with the lowest PSNR against float16. `--clips`: 0 for all.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

import pipeline
from model.metrics.frames import frame_psnr
from pipeline.config import StorageConfig, build_job
from pipeline.engine.worker.latent_spool import to_storage
from pipeline.format.codec import decoded, encoded, held_type, is_plain, storage_name
from pipeline.format.tensors import stored_values
from pipeline.look.originals import Originals
from pipeline.look.showing import LatentDecoder
from pipeline.look.stored import StoredClip, choose, encoder_of, facts, in_turns, latent_bytes
from pipeline.sample_corpus import make_samples
from pipeline.storage import open_store

STORAGES = [
    storage_name(dtype, how) for dtype in ("float32", "float16", "bfloat16", "int8") for how in ("none", "zstd")
]
REPEATS = 5


@dataclass
class Found:
    """Sums over clips of one type."""

    num_bytes: int = 0
    squares: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    against_float16: list[float] = field(default_factory=list)
    against_source: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--frames", default="17")
    parser.add_argument("--clips", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_samples(str(folder / "corpus"))
        options = {"clips.size": args.size, "clips.frames": args.frames, "write.dtype": "float32", "reject_budget": 1}
        options |= {"engine.executor": "inline", "progress": "none"}
        pipeline.encode(build_job({"inputs": str(folder / "corpus"), "output": str(folder / "out"), **options}))
        measure(str(folder / "out"), args.clips)


def measure(output: str, most: int) -> None:
    store, originals = open_store(output, StorageConfig()), Originals(StorageConfig())
    chosen = choose(store)
    decoder = LatentDecoder(encoder_of(store, chosen.receipts, StorageConfig()), None, "cpu")
    found, shuffles = (
        {storage: Found() for storage in STORAGES},
        dict.fromkeys(("not shuffled", "level 1", "level 9"), 0),
    )
    values = squares = one_scale = 0.0
    clips = list(in_turns(store, chosen.receipts))[: most or None]
    for clip in clips:
        latent_CTHW = np.frombuffer(latent_bytes(store, clip), "<f4").reshape(clip.row.shape)
        values, squares = values + latent_CTHW.size, squares + float(np.square(latent_CTHW, dtype=np.float64).sum())
        for storage in STORAGES:
            add(found[storage], latent_CTHW, storage)
        flat = latent_CTHW.reshape(1, -1, *latent_CTHW.shape[2:])
        error = decoded(encoded(flat, "int8").data, "int8", flat.shape).astype(np.float64) - flat
        one_scale += float(np.square(error).sum())
        half = to_storage(latent_CTHW, "float16")
        shuffled = np.ascontiguousarray(half.reshape(-1).view(np.uint8).reshape(-1, 2).T)
        for how, level, data in (("not shuffled", 3, half), ("level 1", 1, shuffled), ("level 9", 9, shuffled)):
            shuffles[how] += len(pa.Codec("zstd", compression_level=level).compress(data))
        show(found, clip, latent_CTHW, decoder, originals, facts(store, clip))
    print(f"{len(clips)} clips, {values:.0f} values")
    print("storage         bits   rms error  write MB/s  read MB/s  PSNR to float16, worst  to the source")
    for storage, item in found.items():
        error, rates = (
            np.sqrt(item.squares / squares),
            [4e-6 * values / spent for spent in (item.encode_s, item.decode_s)],
        )
        line = f"{storage:<15}{8 * item.num_bytes / values:5.2f}{error:12.1e}"
        line += f"{'-':>12}{'-':>11}" if is_plain(storage) else f"{rates[0]:12.0f}{rates[1]:11.0f}"  # plain: no copy
        if item.against_float16:
            line += f"{np.mean(item.against_float16):12.2f}{min(item.against_float16):12.2f}"
        print(line + (f"   {np.mean(item.against_source):.3f}" if item.against_source else ""))
    print(f"int8 with one scale for all channels: rms error {np.sqrt(one_scale / squares):.1e}")
    print("float16+zstd, bits: " + ", ".join(f"{how} {8 * size / values:.2f}" for how, size in shuffles.items()))


def add(item: Found, latent_CTHW: np.ndarray, storage: str) -> None:
    held = to_storage(latent_CTHW, held_type(storage.partition("+")[0]))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        stored = encoded(held, storage)
        middle = time.perf_counter()
        decoded(stored.data, storage, latent_CTHW.shape)
        times.append((middle - began, time.perf_counter() - middle))
    writes, reads = zip(*times, strict=True)
    error = stored_values(stored.tobytes(), storage, latent_CTHW.shape).astype(np.float64) - latent_CTHW
    item.num_bytes += stored.nbytes
    item.squares += float(np.square(error).sum())
    item.encode_s, item.decode_s = item.encode_s + min(writes), item.decode_s + min(reads)


def show(
    found: dict[str, Found],
    clip: StoredClip,
    latent_CTHW: np.ndarray,
    decoder: LatentDecoder,
    originals: Originals,
    row: dict,
) -> None:
    """Decodes the clip as float16, bfloat16 and int8."""
    videos = {}
    for storage in ("float16", "bfloat16", "int8"):
        stored = encoded(to_storage(latent_CTHW, held_type(storage)), storage)
        values = stored_values(stored.tobytes(), storage, latent_CTHW.shape).astype("<f4")
        videos[storage] = torch.cat(list(decoder.decode(torch.from_numpy(values))), dim=1)
        if storage != "float16":
            found[storage].against_float16.append(float(np.mean(frame_psnr(videos["float16"], videos[storage]))))
        with originals.open(clip, row) as frames:
            psnr = decoder.show(clip, values.tobytes(), frames).psnr
            found[storage].against_source.append(psnr or 0.0)


if __name__ == "__main__":
    main()
