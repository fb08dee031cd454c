"""A small training run, also as two processes that share it: `python -m tests.model.training_process FOLDER MEETING`."""

from __future__ import annotations

import os
import sys

from model.training.recipe import training_recipe
from model.training.trainer import train
from pipeline.synthetic_videos.source import SyntheticSource

CONFIG = {
    **{"latent_dim": 4, "embedding_dim": 16, "l_dim": 8, "h_dim": 8, "sep_num_layer": 1, "fusion_num_layer": 1},
    **{"ista_iter_num": 1, "ista_layer_num": 1},
}


def recipe(steps=20, **other):
    """Two stages with clips and images, the second with a discriminator."""
    adversarial = {
        "weight": 0.1,
        "channels": 4,
        "layers": 1,
        "dropout": 0.2,
        "adaptive": True,
        "alternate": True,
        "lecam": 0.01,
    }
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


def one_adversarial_step():
    """One step of four micro-batches that updates both networks from their initial weights."""
    stage = recipe().to_dict()["stages"][1]
    stage["objective"]["adversarial"]["alternate"] = False
    return recipe(stages=[stage | {"steps": 1, "warm_up": 0, "batches": 4}], start={})


def main(folder, meeting):
    """Trains as two ranks, the second one a fork of the first made after the imports. Prints the number of every step."""
    import torch._dynamo  # optimizers import it, for two seconds

    torch.set_num_threads(1)
    child = os.fork()
    rank = int(child == 0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def report(step, values):
        print(step, flush=True)

    train(recipe(), SyntheticSource(5), folder, loaders=0, on_step=report)
    train(one_adversarial_step(), SyntheticSource(5), f"{folder}-one", loaders=0)
    if child:
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
