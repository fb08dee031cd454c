"""Sizes of the GPU day, and those of its rehearsal on a CPU: the same measurements on tiny networks and clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Clip = tuple[int, int, int]  # frames, height, width

TINY: dict[str, dict[str, Any]] = {
    "leanvae": {
        "embedding_dim": 32,
        "latent_dim": 4,
        "ista_iter_num": 2,
        "ista_layer_num": 2,
        "l_dim": 8,
        "h_dim": 24,
        "sep_num_layer": 2,
        "fusion_num_layer": 2,
    },
    "wfvae-s": {
        "latent_dim": 4,
        "base_channels": 4,
        "encoder_num_resblocks": 1,
        "encoder_energy_flow_hidden_size": 6,
        "decoder_num_resblocks": 1,
        "decoder_energy_flow_hidden_size": 8,
    },
}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how large. The defaults are those of the day."""

    device: str = "cuda"
    network: str = "leanvae-dim16"  # of the table and of the training step
    checked: tuple[str, ...] = ("leanvae-dim16", "wfvae-s", "ivvae-z4")
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by network, over the preset's
    clips: tuple[Clip, ...] = ((17, 256, 256), (17, 512, 512), (257, 256, 256), (257, 512, 512))
    batches: tuple[int, ...] = (64, 16, 1, 4, 32, 8, 2)  # the most informative first
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    check_size: int = 64  # side of the frames of `lathe check`
    seconds: float = 0.7  # of timed steps, for one row
    limit_s: float = 75  # of one measurement; compiling all steps of a case takes most of a minute
    compiler: str = "inductor"
    training: tuple[int, Clip] = (4, (17, 256, 256))  # clips, clip
    depthwise: tuple[int, ...] = (5, 512, 7, 32, 32)  # suspicion G1: B C t h w
    attention: tuple[int, ...] = (17, 1, 32400, 512)  # suspicion G10
    varied_steps: int = 120  # suspicion G5
    varied_largest: int = 64  # clips

    def config(self, network: str) -> dict[str, Any] | None:
        """Configuration over the preset's; None for the preset itself."""
        return self.configs.get(network)


# Without IV-VAE: its smallest network takes longer than all the rest.
REHEARSAL = Settings(
    device="cpu",
    network="leanvae",
    checked=("leanvae", "wfvae-s"),
    configs=TINY,
    clips=((33, 32, 32),),
    batches=(2,),
    dtypes=("bfloat16",),
    check_size=32,
    seconds=0.0,
    limit_s=600,  # for a machine that is several times slower than usual
    compiler="eager",
    training=(1, (5, 32, 32)),
    depthwise=(1, 8, 3, 8, 8),
    attention=(2, 1, 64, 32),
    varied_steps=100,
)
