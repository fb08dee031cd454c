"""Image encoder by transformers. Image files in, `embedding` [tokens, width] and `pooled` [width] out."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from pipeline.embedding.texts import Encoded, as_stored, load_model, load_transformers
from pipeline.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.config import EmbedJob
    from pipeline.embedding.checkpoint import EncoderFiles

TOKENS = 256  # that an image counts of `batch_tokens`
CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


class ImageEncoder:
    """One encoder on its device. `device`: cpu, cuda or cuda:N."""

    def __init__(self, job: EmbedJob, files: EncoderFiles, device: str) -> None:
        """Loads weights and image processor. Raises as `TextEncoder`."""
        import torch

        transformers = load_transformers()
        self._torch, self._job, self._device = torch, job, torch.device(device)
        self._model = load_model(transformers, CLASSES[job.encoder], job, files, self._device)
        try:
            # Pillow's resampling, not torchvision's, whose pixels differ.
            self._processor = transformers.AutoImageProcessor.from_pretrained(
                files.tokenizer, local_files_only=True, backend="pil"
            )
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            words = " ".join(str(error).split())[:300]
            raise CheckpointError(f"image processor {files.tokenizer} cannot be loaded: {words}") from None
        layers = self._model.config.num_hidden_layers + 1
        if not -layers <= job.layer < layers:
            raise ConfigError(f"layer: expected {-layers} to {layers - 1} for this encoder, got {job.layer}")

    def encode(self, images: Sequence[bytes]) -> Iterator[Encoded]:
        """Each image once, in order.

        Raises:
            InputError: bytes that are not an image.
        """
        count = max(1, self._job.batch_tokens // TOKENS)
        for first in range(0, len(images), count):
            yield from self._step(first, images[first : first + count])

    def _step(self, first: int, images: Sequence[bytes]) -> Iterator[Encoded]:
        pixels = self._processor([_opened(data) for data in images], return_tensors="pt")["pixel_values"]
        with self._torch.inference_mode():
            output: Any = self._model(pixels.to(self._device, self._model.dtype), output_hidden_states=True)
        hidden = output.last_hidden_state if self._job.layer == -1 else output.hidden_states[self._job.layer]
        for i in range(len(images)):
            found = {"embedding": hidden[i], "pooled": output.pooler_output[i]}
            tensors = {name: as_stored(value, self._job.dtype) for name, value in found.items()}
            yield Encoded(first + i, tensors, hidden.shape[1], False)


def _opened(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"an image of the output cannot be decoded: {error}; see `lathe verify`") from None
