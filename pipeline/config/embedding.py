"""Options of `lathe embed`: the encoder, what it encodes, what is stored, where it runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config.section import Section, as_list
from pipeline.config.sections import DrillConfig, StorageConfig

TEXT_ENCODERS = ("t5", "umt5", "clip", "gemma", "qwen2.5-vl")
IMAGE_ENCODERS = ("clip", "siglip")
FloatType = Literal["float32", "bfloat16", "float16"]


class EmbedJob(Section):
    """A run of `lathe embed`. What changes an embedding is part of the set's fingerprint; which captions, and where it runs, is not."""

    output: str
    """Output of `lathe encode`, published: folder or `s3://bucket/prefix`; `OUTPUT@N` for snapshot N."""
    encoder: Literal["t5", "umt5", "clip", "gemma", "qwen2.5-vl", "siglip"]
    """Kind of encoder: of texts `t5`, `umt5`, `clip`, `gemma`, `qwen2.5-vl`; of images, with `from_column`, `clip`, `siglip`."""
    checkpoint: str
    """Folder of weights as transformers saves them (config.json, safetensors): path, `s3://…` or `hf://owner/repo[/folder][@revision]`."""
    tokenizer: str | None = None
    """Folder of the tokenizer, or of the image processor. None: the checkpoint's folder."""
    name: str | None = None
    """Name of the sidecar set. None: that of the encoder."""
    captions: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ("first",)
    """Which texts: `first` (the caption of each row), `all` (every caption it has), or names as the loader takes them: `caption`,
    `captions`, `captions.NAME`, `metadata.KEY`."""
    from_column: Literal["first_frame"] | None = None
    """Column of images to encode instead of texts: `first_frame`."""
    fingerprint: str | None = None
    """First digits of the fingerprint of the latents, where the output has several."""
    layer: int = -1
    """Which hidden states: -1 for the encoder's output after its last norm, else an index as in Python, 0 for the embeddings of tokens."""
    template: str = "{}"
    """Prompt around each text, which takes the place of `{}`; also around the empty one."""
    skip_tokens: int = Field(0, ge=0)
    """Tokens at the beginning that are not stored, such as those of the template's instructions."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of a text that are stored; longer ones are cut off and counted. None: 77 for `clip`, else 512."""
    compute_dtype: FloatType = "bfloat16"
    """Type of the encoder's weights and of its computation."""
    dtype: FloatType = "bfloat16"
    """Type of stored tensors."""
    batch_tokens: int = Field(16384, ge=1)
    """Tokens of one step of the encoder, padding included: texts of about the same length together. Images count as 256."""
    unit_rows: int = Field(512, ge=1)
    """Rows of one unit of work, which is one file and one receipt."""
    device: str = Field("auto", pattern=r"auto|cpu|cuda(:\d+)?")
    """Device of the encoder."""
    executor: Literal["ray", "inline"] = "ray"
    """Where encoders run: as Ray actors, or in this process."""
    address: str | None = None
    """Address of the Ray cluster. None: `RAY_ADDRESS`, else a private Ray on this machine."""
    encoders: int | None = Field(None, ge=1)
    """Number of actors. None: one for each GPU of the cluster, else one."""
    encoder_cpus: float = Field(1.0, gt=0)
    """Logical CPUs of an actor."""
    storage: StorageConfig = StorageConfig()
    drill: DrillConfig = DrillConfig()

    @property
    def set_name(self) -> str:
        """Name of the sidecar set."""
        return self.name or self.encoder

    @field_validator("template")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError(f"expected text with one {{}}, the place of the caption, got {value!r}")
        return value

    @field_validator("captions")
    @classmethod
    def _sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = ("first", "all", "caption", "captions")
        odd = [name for name in value if name not in known and not name.startswith(("captions.", "metadata."))]
        if not value or odd or (len(value) > 1 and {"first", "all"} & set(value)):
            raise ValueError(
                f"expected first, all, or a list of caption, captions, captions.NAME and metadata.KEY, got {list(value)}"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> EmbedJob:
        kinds = TEXT_ENCODERS if self.from_column is None else IMAGE_ENCODERS
        if self.encoder not in kinds:
            what = "texts; give the column of images (--from first_frame)" if self.from_column is None else "images"
            raise ValueError(f"encoder: {self.encoder} does not encode {what}; expected one of {', '.join(kinds)}")
        if self.from_column is not None and (self.template, self.skip_tokens, self.max_tokens) != ("{}", 0, None):
            raise ValueError("template, skip_tokens and max_tokens are for texts, and from_column gives images")
        if self.executor == "ray" and self.device.startswith("cuda:"):
            raise ValueError(f"device: {self.device} cannot be chosen with Ray; use cuda, or --executor inline")
        return self
