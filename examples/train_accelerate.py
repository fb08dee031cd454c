"""Training loop of Hugging Face Accelerate on the same loader: what `train_dit` does, for a project that has a framework already.

    accelerate launch -m examples.train_accelerate OUTPUT[@snapshot] RUN [STEPS]

The loader already gives each process its share, so it is not passed to `accelerator.prepare`. Its state goes into Accelerate's checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from examples.dit import DiT, DiTConfig, caption_words
from examples.flow import draw, flow_loss
from pipeline import LatentDataset, LatentLoader

BATCH, EVERY = 16, 100  # latents of a step over all processes; steps between checkpoints


def train(output: str, run: str, steps: int, *, batch: int = BATCH, **sizes: Any) -> None:
    """Trains up to `steps`, from the newest checkpoint of the folder `run` if it has one. `sizes`: fields of `DiTConfig`."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    dataset = LatentDataset.open(output)
    loader = LatentLoader(
        dataset,
        batch=batch,
        dp_rank=accelerator.process_index,
        dp_world=accelerator.num_processes,
        normalize="model",
        device=accelerator.device,
        dtype=torch.float32,
        caption_dropout=0.1,
    )
    set_seed(0)
    config = DiTConfig(dataset.spec.latent_channels, **sizes)
    network = DiT(config)
    network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
    accelerator.register_for_checkpointing(loader)
    done = max((int(path.name) for path in Path(run).glob("[0-9]*")), default=0)
    if done:
        # The default on several GPUs is the device, where AdamW's step counts would stay: every step would wait for each of them.
        accelerator.load_state(f"{run}/{done}", map_location="cpu")
    loader.check_ranks()
    for step, found in zip(range(done + 1, steps + 1), loader, strict=False):
        words_BS = caption_words(found.captions, config.vocabulary).to(accelerator.device)
        latents_BCTHW = cast(torch.Tensor, found.latents)  # a list only with `Pack`
        loss = flow_loss(network, latents_BCTHW, words_BS, *draw(0, step, found.ids, latents_BCTHW))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0 or step == steps:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
            accelerator.save_state(f"{run}/partial")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                Path(run, "partial").rename(Path(run, str(step)))  # a folder with a number is whole
    accelerator.end_training()


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1000)
