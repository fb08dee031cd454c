"""The preview's door to `model/`: the network the latents came from, stored latents in, pictures and PSNR out.

Enters: what a data file says of its network, bytes of latents, frames of the source. Leaves: `Picture`s and the sheet. Latents are decoded
in parts of a few groups with the state carried on, so memory is bounded whatever a clip's length. Foreign errors become ours here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.colour import yuv_to_video
from model.evaluation.pictures import Reel
from model.evaluation.roundtrip import eight_bits
from model.out_of_memory import is_out_of_memory
from model.sheets import write_sheet
from pipeline.config import ModelConfig, validate
from pipeline.encoder.network import cuda_available, describe_network, load_torch, load_vae, resolve_device
from pipeline.errors import CheckpointError, ConfigError, NonFiniteLatent, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pipeline.look.originals import ClipFrames
    from pipeline.look.stored import StoredClip

GROUPS_AT_ONCE = 4  # latent frames of a part, besides those coded alone at the start
MOST_DB = 100.0  # what identical frames count as, as in `lathe evaluate`
SHEET_PIXELS = 1600  # after which clips go on in the next row


@dataclass(frozen=True, slots=True)
class Picture:
    """A few frames of a clip, uint8 `3 T H W`: the original (paper white where there is none) and what the latent decodes to."""

    original_CTHW: torch.Tensor
    decoded_CTHW: torch.Tensor
    psnr: float | None  # dB, peak 255, mean over all frames of the clip; None without original


class LatentDecoder:
    """The network, on its device, checked to be the one that made the latents."""

    def __init__(
        self, encoder: dict[str, Any], checkpoint: str | None, device: str, compute_dtype: str = "auto"
    ) -> None:
        """`encoder`: the entry of that name in a data file's metadata. `checkpoint`: where the weights are now, if not there.

        Raises:
            ConfigError: CUDA asked for where there is none, a network this version does not know.
            CheckpointError: weights missing, unsafe, or of another encoder than the one that made the latents.
            AccessError: a hub or bucket that refused or could not be reached.
        """
        self._torch = load_torch()
        source = _source(encoder, checkpoint)
        config = validate(
            ModelConfig,
            {"name": encoder["network"], "config": encoder["checkpoint"]["config"], "device": device, **source},
        )
        cuda = device.startswith("cuda") or (device == "auto" and cuda_available())
        where, dtype = resolve_device(device, compute_dtype, cuda=cuda)
        try:
            self.vae = load_vae(config, where, dtype)
        except CheckpointError as error:
            if checkpoint is not None:
                raise
            raise CheckpointError(
                f"{error.message}; so the latents name their weights: say with --checkpoint where they are now"
            ) from error
        ours = self.vae.identity().sha256
        if encoder["latent_weights_sha256"] not in (ours.mean, ours.moments):
            raise CheckpointError(
                f"the weights of {checkpoint or source} are not those the latents were made with: their encoder hashes to "
                f"{ours.mean} ({ours.moments} with the log-variance), recorded is {encoder['latent_weights_sha256']}; "
                "name the right ones with --checkpoint"
            )
        self.notices = _notices(encoder, self.vae)

    def facts(self) -> dict[str, Any]:
        """What decodes, JSON-ready."""
        return describe_network(self.vae)

    def show(self, clip: StoredClip, latent: bytes, original: ClipFrames | None) -> Picture:
        """Decodes a clip, beside its original if there is one.

        Raises:
            NonFiniteLatent: pixels that are not finite.
            ConfigError: a clip that does not fit into the device's memory.
            DamagedInput: the source breaks.
        """
        reel, decibels = Reel(), list[float]()
        try:
            for decoded_CTHW in self._decoded(clip, latent):
                original_CTHW = self._torch.full_like(decoded_CTHW, 255)
                if original is not None:
                    original_CTHW = self._rgb(original, decoded_CTHW.shape[1])
                    decibels += frame_psnr(original_CTHW, decoded_CTHW)
                reel.add(original_CTHW, decoded_CTHW)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"--device: clip {clip.row.id} ({clip.row.bucket}) does not fit into the memory of {self.vae.device}; use cpu"
            ) from error
        return Picture(*reel.frames(), psnr=sum(decibels) / len(decibels) if decibels else None)

    def _decoded(self, clip: StoredClip, latent: bytes) -> Iterator[torch.Tensor]:
        """uint8 RGB `3 T H W` on the CPU, part after part."""
        torch, vae, row = self._torch, self.vae, clip.row
        stored_Cthw = torch.frombuffer(bytearray(latent), dtype=getattr(torch, row.dtype)).reshape(row.shape)
        latent_BCthw = stored_Cthw[None].to(vae.device, vae.input_dtype)
        length = latent_BCthw.shape[2]
        step = length if vae.decode_chunking == "none" else GROUPS_AT_ONCE
        borders = [0, *range(min(length, vae.spec.lead_frames + step), length, step), length]
        state, frames = None, 0
        for begin, end in pairwise(borders):
            with torch.inference_mode():
                video_BCTHW, state = vae.decode(latent_BCthw[:, :, begin:end], state, last=end == length)
                if not video_BCTHW.isfinite().all():
                    raise NonFiniteLatent(f"decoding {row.id} gave pixels that are not finite; check the weights")
                part_CTHW = eight_bits(video_BCTHW, vae.spec.value_range)[0].cpu()
            frames += part_CTHW.shape[1]
            yield part_CTHW
        if frames != row.num_frames:
            raise RuntimeError(f"{vae.spec.network} gave {frames} frames for a latent of {row.num_frames}")

    def _rgb(self, original: ClipFrames, count: int) -> torch.Tensor:
        """The next frames as the network's own colour conversion makes them, rounded to 8 bits: uint8 `3 T H W`."""
        low_high = self.vae.spec.value_range
        planes_BT3HW = self._torch.from_numpy(original.take(count))[None]
        return eight_bits(yuv_to_video(planes_BT3HW, [original.matrix], low_high), low_high)[0]


def frame_psnr(original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> list[float]:
    """Of each frame in dB, peak 255, identical frames as 100 dB: as `model.evaluation.fidelity` defines it, which needs an extra."""
    difference_CTHW = original_CTHW.double() - other_CTHW.double()
    mse_T = difference_CTHW.square().mean(dim=(0, 2, 3))
    decibels: list[float] = (10 * (255.0**2 / mse_T).log10()).clamp(max=MOST_DB).tolist()
    return decibels


def save_sheet(path: Path, pictures: Sequence[Picture], titles: Sequence[str]) -> None:
    """A titled pair for each clip, as PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        write_sheet(path, [(one.original_CTHW, one.decoded_CTHW) for one in pictures], titles, width=SHEET_PIXELS)
    except OSError as error:
        raise OutputError(f"--sheet {path}: cannot be written: {error.strerror}; name another file") from error


def _source(encoder: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    """Where the weights come from: said now, or recorded then."""
    if checkpoint is not None:
        return {"checkpoint": checkpoint}
    recorded = encoder["checkpoint"]
    if encoder["untrained"]:
        return {"untrained": recorded["untrained_seed"]}
    return {"checkpoint": recorded["uri"]}


def _notices(encoder: dict[str, Any], vae: Any) -> list[str]:
    found = []
    if vae.untrained:
        found.append(f"UNTRAINED random weights (seed {vae.seed}): the decoded pictures mean nothing")
    if vae.weights_sha256 != encoder["checkpoint"]["weights_sha256"]:
        found.append(
            f"these weights have the encoder that made the latents and another decoder (all weights: {vae.weights_sha256[:12]}, "
            f"recorded: {encoder['checkpoint']['weights_sha256'][:12]}): the pictures are those of this decoder"
        )
    if vae.numerics != encoder["numerics"]:
        found.append(
            f"the latents were made with version {encoder['numerics']} of this network's arithmetic, this is version {vae.numerics}"
        )
    return found
