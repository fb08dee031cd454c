"""Text encoder by transformers. Texts in, tensors of their true length out: `embedding` [tokens, width], of CLIP also `pooled` [width]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.embedding.checkpoint import max_tokens
from pipeline.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pipeline.config import EmbedJob
    from pipeline.embedding.checkpoint import EncoderFiles

CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


class Encoded(NamedTuple):
    """Tensors of one text or image. `place`: among those that were given. `tokens`: stored ones; `truncated`: more were cut off."""

    place: int
    tensors: dict[str, np.ndarray]
    tokens: int
    truncated: bool


class TextEncoder:
    """One encoder on its device. `device`: cpu, cuda or cuda:N."""

    def __init__(self, job: EmbedJob, files: EncoderFiles, device: str) -> None:
        """Loads weights and tokenizer.

        Raises:
            CheckpointError: weights that do not fit the model, a tokenizer that cannot be loaded.
            ConfigError: transformers is not installed; a layer that there is not; no token for the empty text.
        """
        import torch

        transformers = load_transformers()
        self._torch, self._job, self._device = torch, job, torch.device(device)
        self._most = max_tokens(job) + job.skip_tokens
        kind = files.config["model_type"]
        name = "CLIPTextModel" if job.encoder == "clip" else CLASSES.get(kind, "AutoModel")
        self._model = load_model(transformers, name, job, files, self._device)
        self._tokenizer = _tokenizer(transformers, files)
        states = self._forward([self._ids("")[0] or [0]])[1]
        if not -len(states) <= job.layer < len(states):
            raise ConfigError(f"layer: expected {-len(states)} to {len(states) - 1} for this encoder, got {job.layer}")
        if len(self._ids("")[0]) <= job.skip_tokens:
            raise ConfigError(
                "template: the empty caption has no token to store; give a template, or fewer skip_tokens: "
                f"it has {len(self._ids('')[0])} tokens, and {job.skip_tokens} are skipped"
            )

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Each text once, long ones first; a step takes texts of about one length, at most `batch_tokens` with their padding."""
        found = [self._ids(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: -len(found[i][0]))
        while order:
            longest = len(found[order[0]][0])
            step, order = _split(order, max(1, self._job.batch_tokens // longest))
            yield from self._step(step, [found[i][0] for i in step], [found[i][1] for i in step])

    def _ids(self, text: str) -> tuple[list[int], bool]:
        """Tokens of a text in its template, and whether more were cut off."""
        prompt = self._job.template.replace("{}", text)
        ids = self._tokenizer(prompt, verbose=False)["input_ids"]
        if len(ids) <= self._most:
            return ids, False
        return self._tokenizer(prompt, truncation=True, max_length=self._most, verbose=False)["input_ids"], True

    def _forward(self, ids: list[list[int]]) -> tuple[Any, Any]:
        torch, most = self._torch, max(map(len, ids))
        padding = self._tokenizer.pad_token_id or 0
        padded = torch.tensor([one + [padding] * (most - len(one)) for one in ids], device=self._device)
        mask = torch.tensor([[1] * len(one) + [0] * (most - len(one)) for one in ids], device=self._device)
        with torch.inference_mode():
            output = self._model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        return output, output.hidden_states

    def _step(self, places: list[int], ids: list[list[int]], cut: list[bool]) -> Iterator[Encoded]:
        output, states = self._forward(ids)
        hidden = output.last_hidden_state if self._job.layer == -1 else states[self._job.layer]
        pooled = output.pooler_output if self._job.encoder == "clip" else None
        skip = self._job.skip_tokens
        for i, (place, one, truncated) in enumerate(zip(places, ids, cut, strict=True)):
            tensors = {"embedding": as_stored(hidden[i, skip : len(one)], self._job.dtype)}
            if pooled is not None:
                tensors["pooled"] = as_stored(pooled[i], self._job.dtype)
            yield Encoded(place, tensors, len(one) - skip, truncated)


def load_transformers() -> Any:
    """The library, quiet.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "encoders come from transformers, which is not installed: pip install 'lathe[sidecars]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_model(transformers: Any, name: str, job: EmbedJob, files: EncoderFiles, device: torch.device) -> Any:
    """The model of class `name`, on its device, for inference. Only safetensors are read; code of a checkpoint is never run.

    Raises:
        CheckpointError: weights that do not fit the model: transformers would fill it up with random ones.
    """
    import torch
    from safetensors import SafetensorError

    options = {"dtype": getattr(torch, job.compute_dtype), "use_safetensors": True, "local_files_only": True}
    try:
        model, report = getattr(transformers, name).from_pretrained(files.weights, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {job.checkpoint} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    problems = [*report["missing_keys"], *report["mismatched_keys"]]
    if problems:
        raise CheckpointError(
            f"checkpoint {job.checkpoint} lacks {len(problems)} weights of {name}, or has them in another shape, such as {problems[0]}"
        )
    return model.to(device).eval().requires_grad_(False)


def as_stored(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """The values in a storage type; bfloat16 as its bits, uint16."""
    import torch

    found = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
    return found.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else found.numpy()


def _tokenizer(transformers: Any, files: EncoderFiles) -> Any:
    try:
        found = transformers.AutoTokenizer.from_pretrained(files.tokenizer, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"tokenizer {files.tokenizer} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    return found


def _split(items: list[int], count: int) -> tuple[list[int], list[int]]:
    return items[:count], items[count:]
