"""Memory that a training step keeps between forward and backward pass, counted without computing.

    python benchmarks/training_memory.py [NETWORK ...] [--clip 17x256x256]

Every tensor that autograd saves is counted once, without parameters; shapes are followed by fake tensors, so any size works on any machine.
Gradients, optimizer and averaged weights come in addition (parameters times 4 bytes each: 2 for Adam, 1, 1), and the libraries' workspace.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file as well as with -m

from model.training.networks import trainable

if TYPE_CHECKING:
    from torch import nn

NETWORKS = ("leanvae-dim16", "wfvae-s", "wfvae-l", "ivvae-z16")
CLIP = "17x256x256"


def kept_gb(name: str, clip: tuple[int, int, int], precision: torch.dtype, *, recompute: bool) -> float:
    """GB that a forward pass of one clip (frames, height, width) leaves for the backward pass."""
    network = cast("nn.Module", trainable(name, recompute=recompute))
    fake, sizes, alive = FakeTensorMode(allow_non_fake_inputs=True), dict[int, int](), []
    state = {key: fake.from_tensor(tensor.detach()) for key, tensor in network.state_dict().items()}
    for key, _ in network.named_parameters():
        state[key].requires_grad_()
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)  # an address is not given away again
        return tensor

    with fake, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            torch.func.functional_call(network, state, (torch.empty(1, 3, *clip),))
    return sum(sizes.values()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="families' presets")
    parser.add_argument("--clip", default=CLIP, help="frames x height x width")
    options = parser.parse_args()
    frames, height, width = (int(number) for number in options.clip.split("x"))
    print(
        f"GB for one clip of {options.clip}\n{'network':16}{'float32':>9}{'bfloat16':>10}{'recomputed: float32':>22}{'bfloat16':>10}"
    )
    for name in options.networks:
        found = [
            kept_gb(name, (frames, height, width), precision, recompute=recompute)
            for recompute in (False, True)
            for precision in (torch.float32, torch.bfloat16)
        ]
        print(f"{name:16}{found[0]:9.1f}{found[1]:10.1f}{found[2]:22.1f}{found[3]:10.1f}", flush=True)


if __name__ == "__main__":
    main()
