"""A small training run, also as a process: `python -m tests.model.training_process FOLDER MEETING RANK WORLD LOADERS`."""

from __future__ import annotations

import sys

import torch

from model.training.recipe import training_recipe
from model.training.source import SyntheticSource
from model.training.trainer import train

CONFIG = {
    **{"latent_dim": 4, "embedding_dim": 16, "l_dim": 8, "h_dim": 8, "sep_num_layer": 1, "fusion_num_layer": 1},
    **{"ista_iter_num": 1, "ista_layer_num": 1},
}


def recipe(steps=20, **other):
    """Two stages with clips and images, the second with a discriminator."""
    adversarial = {"weight": 0.1, "channels": 4, "layers": 1, "adaptive": True, "lecam": 0.01}
    stage = {
        **{"steps": steps // 2, "learning_rate": 1e-3, "final_learning_rate": 1e-4, "warm_up": 2, "batches": 2},
        "groups": [
            {"frames": 5, "height": 32, "width": 32, "batch": 2, "weight": 3},
            {"frames": 1, "height": 32, "width": 48, "batch": 3},
        ],
    }
    terms = {"l1": 4.0, "haar_low": 0.2, "haar_high": 0.4, "pyramid": 1.0, "kl": 1e-7}
    section = {
        **{"network": "leanvae", "config": CONFIG, "seed": 3, "start": {"linear": 4}, "ema": 0.9},
        **{"optimizer": {"name": "muon"}, "log_every": 1, "sheet_every": 1000, "checkpoint_every": 10},
        "stages": [
            stage | {"name": "reconstruction", "objective": {"terms": terms, "perceptual_frames": "group"}},
            stage
            | {"name": "adversarial", "discriminator_learning_rate": 1e-4}
            | {"objective": {"terms": terms, "adversarial": adversarial}},
        ],
    }
    return training_recipe(section | other)


def main(folder, meeting, rank, world, loaders):
    """Prints the number of every step."""
    torch.set_num_threads(1)
    if int(world) > 1:
        where = f"file://{meeting}"
        torch.distributed.init_process_group("gloo", init_method=where, rank=int(rank), world_size=int(world))

    def report(step, values):
        print(step, flush=True)

    train(recipe(), SyntheticSource(5), folder, loaders=int(loaders), on_step=report)


if __name__ == "__main__":
    main(*sys.argv[1:])
