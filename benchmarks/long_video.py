"""Peak memory of encoding one long video as a whole compared with a short one, over all processes of a build.

    python benchmarks/long_video.py [--minutes 1,10] [--formats parquet,tar] [--network small] [--kbit 400] [--json FILE]

Each build is a fresh `python -m pipeline encode ... --clips whole --executor inline` with one decoder, from a tar. The peak of a process is
the kernel's high-water mark (`VmHWM`: anonymous memory and mapped files), read from /proc until the process ends, so this needs Linux.
`small` is a LeanVAE of few layers with the 16 latent channels of the published one: latents have the usual size, encoding is fast.
The bar: every longer video <= 1.10 of the shortest, all processes together.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

BAR = 1.10
SMALL = {
    "embedding_dim": 32,
    "latent_dim": 16,
    "ista_iter_num": 2,
    "ista_layer_num": 2,
    "l_dim": 8,
    "h_dim": 24,
    "sep_num_layer": 1,
    "fusion_num_layer": 1,
}


def make_shard(path: Path, minutes: float, fps: int, height: int, width: int, kbit: int) -> int:
    """One H.264 video of a scrolling texture, as the only sample of a tar. Returns its bytes."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height + 64, width + 64, 3), np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.bit_rate = kbit * 1000
        stream.options = {"preset": "ultrafast", "g": str(fps * 4)}
        for n in range(round(minutes * 60 * fps)):
            down, right = abs(n % 128 - 64), abs(n // 2 % 128 - 64)
            picture = np.ascontiguousarray(texture[down : down + height, right : right + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = buffer.getvalue()
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("video.mp4")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return len(data)


def high_water(pid: int) -> int:
    """`VmHWM` of a process in bytes; 0 once it has no memory any more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = status.partition("VmHWM:")[2].split()
    return int(found[0]) * 1024 if found else 0


def children(pid: int) -> list[int]:
    """Children of all threads of a process."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []  # it has just ended
    return found


def peaks(command: list[str], environment: dict[str, str]) -> tuple[int, int, float]:
    """Runs `command`: highest resident bytes of the process, of its largest child, and seconds. A failure ends the benchmark."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    own = child = 0
    while process.poll() is None:
        own = max(own, high_water(process.pid))
        child = max([child, *map(high_water, children(process.pid))])
        time.sleep(0.02)
    seconds = time.perf_counter() - begun
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}:\n{output}")
    return own, child, seconds


def measure(folder: Path, shard: Path, format: str, args: argparse.Namespace) -> dict[str, Any]:
    """One build of one video."""
    network = ["--model", "leanvae", "--set", f"model.config={json.dumps(SMALL)}"]
    if args.network != "small":
        network = ["--model", args.network]
    with tempfile.TemporaryDirectory(dir=folder) as run:
        output = Path(run) / "out"
        command = [sys.executable, "-m", "pipeline", "encode", str(shard), str(output), *network, "--untrained", "0"]
        command += ["--size", args.size, "--clips", "whole", "--format", format, "--executor", "inline"]
        command += ["--set", "engine.decoders=1", "--progress", "none"]
        own, child, seconds = peaks(command, {**os.environ, "TMPDIR": run})
        receipt = json.loads(next((output / "_receipts").iterdir()).read_text())
    return {
        "format": format,
        "encoder_mb": round(own / 1e6, 1),
        "decoder_mb": round(child / 1e6, 1),
        "total_mb": round((own + child) / 1e6, 1),
        "frames": receipt["counts"]["frames"],
        "file_mb": round(sum(item["num_bytes"] for item in receipt["files"]) / 1e6, 1),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default="1,10", help="lengths; all are compared with the first")
    parser.add_argument("--formats", default="parquet,tar")
    parser.add_argument("--network", default="small", help="`small`, or a registered network such as leanvae-dim16")
    parser.add_argument("--size", default="256x256", help="HEIGHTxWIDTH")
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--kbit", type=int, default=400, help="kilobits a second of the encoded video")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    height, width = (int(side) for side in args.size.split("x"))
    lengths = [float(text) for text in args.minutes.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        shards = {minutes: Path(name) / f"{minutes:g}.tar" for minutes in lengths}
        video_mb = {
            minutes: round(make_shard(path, minutes, args.fps, height, width, args.kbit) / 1e6, 1)
            for minutes, path in shards.items()
        }
        for format in args.formats.split(","):
            first = 0.0
            for minutes, shard in shards.items():
                row = {"minutes": minutes, "video_mb": video_mb[minutes], **measure(Path(name), shard, format, args)}
                first = first or row["total_mb"]
                rows.append({**row, "format": format, "ratio": round(row["total_mb"] / first, 3)})
                print(
                    f"{format:8}{minutes:5g} min ({row['video_mb']:6.1f} MB, {row['frames']:6d} frames -> {row['file_mb']:6.1f} MB): "
                    f"encoder {row['encoder_mb']:7.1f} MB + decoder {row['decoder_mb']:6.1f} MB = {row['total_mb']:7.1f} MB, "
                    f"ratio {rows[-1]['ratio']:.3f}, {row['seconds']:.0f} s",
                    flush=True,
                )
    worst = max(row["ratio"] for row in rows)
    for format in args.formats.split(","):
        ratio = max(row["ratio"] for row in rows if row["format"] == format)
        print(
            f"RESULT {ratio} <= {BAR} peak memory of a {lengths[-1]:g}-minute video, of a {lengths[0]:g}-minute one, {format}"
        )
    if args.json:
        record = {"network": args.network, "size": args.size, "fps": args.fps, "kbit": args.kbit}
        args.json.write_text(json.dumps({**record, "bar": BAR, "worst_ratio": worst, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
