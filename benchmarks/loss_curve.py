"""Draws how a training run went: PSNR of the clips it learned from and learning rate over steps, as a PNG.

Enters: `run.json` of published weights (by default those that come with Lathe). Leaves: the picture. Needs the extra `training`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from model.checkpoint import EMBEDDED

SHIPPED = EMBEDDED / "leanvae-mini-dim16" / "run.json"


def draw(run: dict, path: Path) -> None:
    """`run`: as `model.training.run_folder` publishes it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curve = run["loss"]
    steps = [point["step"] for point in curve]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=[3, 1], layout="constrained")
    above.plot(steps, [point["psnr"] for point in curve], color="tab:blue")
    above.set_ylabel("PSNR of training clips, dB")
    below.plot(steps, [point["learning_rate"] for point in curve], color="tab:grey")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Prints where the picture is, and how far the run came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=SHIPPED, help="run.json of published weights")
    parser.add_argument("--out", type=Path, default=Path("loss.png"))
    arguments = parser.parse_args()
    run = json.loads(arguments.run.read_text())
    draw(run, arguments.out)
    first, last = run["loss"][0], run["loss"][-1]
    rise = last["psnr"] - first["psnr"]
    print(f"{last['step']} steps: {first['psnr']:.2f} dB -> {last['psnr']:.2f} dB ({rise:+.2f}); {arguments.out}")


if __name__ == "__main__":
    main()
