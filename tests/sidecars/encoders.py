"""Small random encoders as transformers saves them, with tokenizers of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTH = 32
WORDS = "a the cat dog runs sleeps red blue Ein Café video of in on grass snow 0 1 2 3 4 5 6 7 8 9 : Describe"


def save_t5(folder: Path, kind: str = "t5", seed: int = 0) -> Path:
    """T5 or UMT5 with two layers; its tokenizer ends each text with `</s>`, as T5's does."""
    import transformers

    _seed(seed)
    names = {"t5": ("T5Config", "T5EncoderModel"), "umt5": ("UMT5Config", "UMT5EncoderModel")}[kind]
    config, model = (getattr(transformers, name) for name in names)
    size = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 48}
    model(config(**size)).save_pretrained(folder)
    _save_tokenizer(folder, end=True)
    return folder


def save_clip_text(folder: Path) -> Path:
    import transformers

    _seed(1)
    size = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPTextConfig(
        **size, vocab_size=48, max_position_embeddings=16, eos_token_id=1, bos_token_id=3, pad_token_id=0
    )
    transformers.CLIPTextModel(config).save_pretrained(folder)
    _save_tokenizer(folder, end=True)
    return folder


def save_gemma(folder: Path) -> Path:
    """A decoder without a token for the empty text."""
    import transformers

    _seed(2)
    size = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma2Config(**size, num_key_value_heads=2, head_dim=8, vocab_size=48)
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    _save_tokenizer(folder, end=False)
    return folder


def save_clip_vision(folder: Path) -> Path:
    import transformers

    _seed(3)
    size = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size, image_size=32, patch_size=16)).save_pretrained(
        folder
    )
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )
    processor.save_pretrained(folder)
    return folder


def _seed(seed: int) -> Any:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)


def _save_tokenizer(folder: Path, *, end: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    options = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
