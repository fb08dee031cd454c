"""Decoding of stored latents for the preview: the network, PSNR against the original, the picture sheet. Access to `model/`.

Takes a data file's description of its network, bytes of latents, frames of the source. Gives `Picture`s and the sheet. Latents are decoded
in parts of a few groups with carried state, so memory does not depend on a clip's length. Errors of other libraries are translated here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.colour import yuv_to_video
from model.metrics.examples import FrameSampler
from model.metrics.frames import frame_psnr, frame_ssim
from model.metrics.roundtrip import eight_bits
from model.out_of_memory import is_out_of_memory
from model.sheets import write_sheet
from pipeline.config import ModelConfig, validate
from pipeline.encoder.network import cuda_available, describe_network, load_torch, load_vae, resolve_device
from pipeline.errors import CheckpointError, ConfigError, NonFiniteLatent, OutputError
from pipeline.format.codec import value_type

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pipeline.look.originals import ClipFrames
    from pipeline.look.stored import StoredClip

GROUPS_AT_ONCE = 4  # latent frames of a part, in addition to the lead frames at the start
SHEET_PIXELS = 1600  # width of the sheet


@dataclass(frozen=True, slots=True)
class Picture:
    """A few frames of a clip, uint8 `3 T H W`: the original (white where there is none) and the decoded latent."""

    original_CTHW: torch.Tensor = field(repr=False)
    decoded_CTHW: torch.Tensor = field(repr=False)
    psnr: float | None  # dB, peak 255, mean over all frames of the clip; None without original
    ssim: float | None = None  # mean over all frames; None without original
    frame_psnr: tuple[float, ...] = ()  # of all frames; empty without original
    frame_ssim: tuple[float, ...] = ()


class LatentDecoder:
    """The network that made the latents, on its device. Its weights are checked against those recorded."""

    def __init__(
        self, encoder: dict[str, Any], checkpoint: str | None, device: str, compute_dtype: str = "auto"
    ) -> None:
        """`encoder`: the entry of that name in a data file's metadata. `checkpoint`: present place of the weights, if it is another.

        Raises:
            ConfigError: CUDA asked for where there is none, a network this version does not know.
            CheckpointError: weights missing, unsafe, or of another encoder than the one that made the latents.
            AccessError: a hub or bucket refused or could not be reached.
        """
        self._torch = load_torch()
        source = _source(encoder, checkpoint)
        recorded = encoder["checkpoint"]["config"]
        # Another checkpoint may have another decoder, with a configuration of its own; keys that the latents depend on stay as recorded.
        forced = recorded if checkpoint is None else encoder["config"]
        config = validate(ModelConfig, {"name": encoder["network"], "config": forced, "device": device, **source})
        cuda = device.startswith("cuda") or (device == "auto" and cuda_available())
        where, dtype = resolve_device(device, compute_dtype, cuda=cuda)
        try:
            self.vae = load_vae(config, where, dtype, defaults=None if checkpoint is None else recorded)
        except CheckpointError as error:
            if checkpoint is not None:
                raise
            raise CheckpointError(
                f"{error.message}; the latents' metadata names this place for the weights: give with --checkpoint where they are now"
            ) from error
        ours = self.vae.identity().sha256
        if encoder["latent_weights_sha256"] not in (ours.mean, ours.moments):
            raise CheckpointError(
                f"the weights of {checkpoint or source} are not those the latents were made with: the hash of their encoder is "
                f"{ours.mean} ({ours.moments} with the log-variance), recorded is {encoder['latent_weights_sha256']}; "
                "give the right ones with --checkpoint"
            )
        self.notices = _notices(encoder, self.vae)

    def facts(self) -> dict[str, Any]:
        """Description of the network, JSON-ready."""
        return describe_network(self.vae)

    def show(self, clip: StoredClip, latent: bytes, original: ClipFrames | None, frames: int = 3) -> Picture:
        """Decodes a clip, beside its original if there is one. `frames`: most that the picture has.

        Raises:
            NonFiniteLatent: pixels that are not finite.
            ConfigError: a clip that does not fit into the device's memory.
            DamagedInput: the source is damaged.
        """
        reel, decibels, similarities = FrameSampler(), list[float](), list[float]()
        try:
            for decoded_CTHW in self._decoded(clip, latent):
                original_CTHW = self._torch.full_like(decoded_CTHW, 255)
                if original is not None:
                    original_CTHW = self._rgb(original, decoded_CTHW.shape[1])
                    decibels += frame_psnr(original_CTHW, decoded_CTHW)
                    similarities += frame_ssim(original_CTHW, decoded_CTHW)
                reel.add(original_CTHW, decoded_CTHW)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"--device: clip {clip.row.id} ({clip.row.bucket}) does not fit into the memory of {self.vae.device}; use cpu"
            ) from error
        original_CTHW, decoded_CTHW = reel.frames(frames)
        return Picture(
            original_CTHW,
            decoded_CTHW,
            psnr=_mean(decibels),
            ssim=_mean(similarities),
            frame_psnr=tuple(decibels),
            frame_ssim=tuple(similarities),
        )

    def decode(self, latent_Cthw: torch.Tensor, name: str = "the latent") -> Iterator[torch.Tensor]:
        """Decodes a raw latent `C t h w` of any float type. Gives parts in order, uint8 RGB `3 T H W` on the CPU.

        Raises:
            NonFiniteLatent: pixels that are not finite; the message has `name`.
        """
        torch, vae = self._torch, self.vae
        latent_BCthw = latent_Cthw[None].to(vae.device, vae.input_dtype)
        length = latent_BCthw.shape[2]
        step = length if vae.decode_chunking == "none" else GROUPS_AT_ONCE
        borders = [0, *range(min(length, vae.spec.lead_frames + step), length, step), length]
        state = None
        for begin, end in pairwise(borders):
            with torch.inference_mode():
                video_BCTHW, state = vae.decode(latent_BCthw[:, :, begin:end], state, last=end == length)
                if not video_BCTHW.isfinite().all():
                    raise NonFiniteLatent(f"decoding {name} gave pixels that are not finite; check the weights")
                yield eight_bits(video_BCTHW, vae.spec.value_range)[0].cpu()

    def _decoded(self, clip: StoredClip, latent: bytes) -> Iterator[torch.Tensor]:
        """Decoded parts of a stored clip in order, as `decode` gives them."""
        row, frames = clip.row, 0
        stored_Cthw = self._torch.frombuffer(bytearray(latent), dtype=getattr(self._torch, value_type(row.dtype)))
        for part_CTHW in self.decode(stored_Cthw.reshape(row.shape), row.id):
            frames += part_CTHW.shape[1]
            yield part_CTHW
        if frames != row.num_frames:
            raise RuntimeError(f"{self.vae.spec.network} gave {frames} frames for a latent of {row.num_frames}")

    def _rgb(self, original: ClipFrames, count: int) -> torch.Tensor:
        """The next frames in the network's own colour conversion, rounded to 8 bits: uint8 `3 T H W`."""
        low_high = self.vae.spec.value_range
        planes_BT3HW = self._torch.from_numpy(original.take(count))[None]
        return eight_bits(yuv_to_video(planes_BT3HW, [original.matrix], low_high), low_high)[0]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


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
    """Configuration of the weights: the checkpoint given, else the recorded one."""
    if checkpoint is not None:
        return {"checkpoint": checkpoint}
    recorded = encoder["checkpoint"]
    if encoder["untrained"]:
        return {"untrained": recorded["untrained_seed"]}
    return {"checkpoint": recorded["uri"]}


def _notices(encoder: dict[str, Any], vae: Any) -> list[str]:
    found = []
    if vae.untrained:
        found.append(f"UNTRAINED random weights (seed {vae.seed}): the decoded pictures are meaningless")
    if vae.weights_sha256 != encoder["checkpoint"]["weights_sha256"]:
        found.append(
            f"these weights have the encoder that made the latents but another decoder (all weights: {vae.weights_sha256[:12]}, "
            f"recorded: {encoder['checkpoint']['weights_sha256'][:12]}): the pictures show this decoder"
        )
    if vae.numerics != encoder["numerics"]:
        found.append(
            f"the latents were made with version {encoder['numerics']} of this network's arithmetic, this is version {vae.numerics}"
        )
    return found
