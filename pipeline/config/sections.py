"""Sections of an `EncodeJob`: every option with its type, unit, default, meaning and validation.

Options that depend on the network (frame counts) are checked later, against the network's strides.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from pipeline.config.clips import ClipConfig
from pipeline.config.images import ImageConfig
from pipeline.config.members import check_members
from pipeline.config.section import Section, as_list, matching
from pipeline.config.tables import TableConfig
from pipeline.records import MAIN, MemberRule

MiB = 1024 * 1024
EMBEDDED = "leanvae-mini-dim16"  # its weights come with the package


def _as_inputs(value: Any) -> Any:
    return [value] if isinstance(value, str) else value  # not split at commas, which are part of brace patterns


def _as_switch(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML reads on and off as booleans


class ModelConfig(Section):
    """The network, its weights and its device."""

    name: str = "leanvae-dim16"
    """Registered network; `lathe models` lists them. Default without weights and configuration: the one whose weights come with Lathe."""
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    """Weights: a local path, `s3://bucket/key` or `hf://owner/repo/file`. Official .ckpt, training .ckpt or .safetensors."""
    untrained: int | None = Field(None, ge=0)
    """Seed for random weights instead of a checkpoint, for trials: the latents are meaningless, and the output records it."""
    config: dict[str, Any] | None = None
    """Network configuration with its published names, if it is not the registered one (needed for safetensors of a variant)."""
    device: Annotated[str, matching(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")] = "auto"
    """`auto` (CUDA if available, else CPU), `cpu`, `cuda`, `cuda:N`."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the network. `auto`: bfloat16 on CUDA, float32 on CPU. On a CPU without AVX-512 bfloat16 is several times slower than
    float32. Part of the fingerprint."""

    @model_validator(mode="before")
    @classmethod
    def _default_network(cls, values: Any) -> Any:
        given = {name for name, value in values.items() if value is not None} if isinstance(values, dict) else {"name"}
        return values if given & {"name", "checkpoint", "untrained", "config"} else {**values, "name": EMBEDDED}

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.checkpoint is not None and self.untrained is not None:
            raise ValueError("checkpoint and untrained exclude each other: set only one of them")
        return self


class DecodeConfig(Section):
    """Limits and policies of decoding. A limit is checked before memory of that size is allocated."""

    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: H.264, HEVC and VP9 of 8 bits are decoded by NVDEC of the encoder's GPU and scaled there; other videos stay on the CPU. The
    pixels are the same, but NVDEC does not notice damage inside a picture. Part of the fingerprint."""
    nvdec_min_pixels: int = Field(1280 * 720, ge=0)
    """With `cuda`: videos of smaller frames, in pixels, are decoded on the CPU, where they are cheap and start faster."""
    max_pixels: int = Field(7680 * 4320, ge=1)
    """Largest coded frame, pixels."""
    max_frames: int = Field(2_000_000, ge=1)
    """Most frames in one video."""
    max_duration_s: float = Field(6 * 3600.0, gt=0)
    """Longest video, seconds."""
    max_video_bytes: int = Field(8 * 1024 * MiB, ge=1)
    """Largest encoded file, bytes."""
    timeout_s: float = Field(120.0, gt=0)
    """A decoder that does not answer for this many seconds is killed; the video is tried once more, then rejected as `decode_timeout`."""
    memory_bytes: int = Field(8 * 1024 * MiB, ge=256 * MiB)
    """Address space that a decoder process may use beyond that at its start, bytes."""
    hdr: Literal["reject", "convert"] = "reject"
    """PQ and HLG video: reject (`hdr`), or tone-map to BT.709."""
    interlaced: Literal["reject", "deinterlace", "keep"] = "deinterlace"
    """Interlaced video: reject (`interlaced`), deinterlace with bwdif, or keep the comb."""
    damage: Literal["reject", "warn"] = "reject"
    """Frames that the decoder cannot decode or conceals: reject clips with such frames (`corrupt_stream`), or keep them, with a warning
    `damaged_frames` in the row."""
    untagged_matrix: Literal["auto", "bt601", "bt709"] = "auto"
    """Colour matrix of untagged video. `auto`: BT.709 from 720 lines up, else BT.601, as players do."""


class StorageConfig(Section):
    """Object storage. Credentials come from the client's own chain (environment, profile, instance role)."""

    endpoint_url: str | None = None
    """URL of an S3 endpoint other than AWS; `AWS_ENDPOINT_URL` does the same."""
    read_ahead_bytes: int = Field(64 * MiB, ge=MiB)
    """Most bytes fetched ahead of the tar parser, per shard."""
    part_bytes: int = Field(8 * MiB, ge=64 * 1024)
    """Bytes of one ranged GET."""
    spool_bytes: int = Field(8 * MiB, ge=MiB)
    """Videos of more bytes wait for their decoder in a temporary file, others in memory; several per shard wait."""
    patience_s: float = Field(180.0, gt=0)
    """Seconds for which one request is retried, with pauses that grow to 15 s, before the store counts as unavailable. For a download:
    longest time without a byte."""
    max_attempts: int | None = Field(None, ge=1)
    """Most tries of one request. For a download: most tries in a row without a byte. Default: limited only by `patience_s`."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """Longest TCP/TLS connect, seconds."""
    read_timeout_s: float = Field(60.0, gt=0)
    """Longest silence on an open connection, seconds."""
    files_per_shard: int = Field(64, ge=1)
    """Most plain video files per virtual shard."""
    shard_bytes: int = Field(1024 * MiB, ge=1)
    """Most bytes of plain video files per virtual shard; a larger file is a shard of its own."""

    @field_serializer("endpoint_url", when_used="json")
    def _without_password(self, value: str | None) -> str | None:
        """Run logs and snapshots hold the job, and readers of the output see them."""
        return value if value is None else re.sub(r"//[^/]*@", "//", value)


class WriteConfig(Section):
    """Format and dtype of the output."""

    format: Literal["parquet", "tar"] = "parquet"
    """Parquet, or WebDataset tar."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Storage type of latents. `int8`: 256 levels between the smallest and largest value of each channel of each clip, read as float16."""
    compression: Literal["none", "zstd"] = "none"
    """`zstd`: each tensor is byte-shuffled and compressed, without loss."""
    moments: bool = False
    """Store the log-variance in addition to the mean."""
    store: Annotated[tuple[Literal["first_frame", "i2v_cond"], ...], BeforeValidator(as_list)] = ()
    """What rows store besides the latent, for image-to-video models: `first_frame`, the clip's first frame as a lossless image;
    `i2v_cond`, the latent of this frame followed by zeros."""
    row_group_bytes: int = Field(2 * MiB, ge=64 * 1024, le=1024 * MiB)
    """Target size of a Parquet row group, bytes: what a reader fetches for one row at random."""
    file_bytes: int = Field(512 * MiB, ge=MiB)
    """A data file is closed when it exceeds this size, bytes."""
    max_abs: float = Field(1e4, gt=0)
    """Largest plausible magnitude of a latent value; a clip with a larger one is rejected as `non_finite_latent`."""

    @model_validator(mode="after")
    def _means_only(self) -> Self:
        if self.moments and self.dtype == "int8":
            raise ValueError(
                "dtype int8 does not go with moments: 256 levels over a log-variance change the deviation of a sample by up to 5 %; "
                "use float16 or bfloat16, with compression zstd if space matters"
            )
        return self


class EngineConfig(Section):
    """Processes, batches and retries of a build."""

    executor: Literal["ray", "inline"] = "ray"
    """`ray`: encoders are Ray actors. `inline`: the encoder runs in this process, with decoders in child processes."""
    address: str | None = None
    """Ray cluster to join. Default: `RAY_ADDRESS` if set, else a private local Ray."""
    encoders: int | None = Field(None, ge=1)
    """Encoder actors. Default: one per GPU, or one on CPU."""
    decoders: int | None = Field(None, ge=1)
    """Decoder processes per encoder. Default: CPU cores per encoder, at least one, at most 16."""
    decoder_cpus: float = Field(1.0, gt=0)
    """CPUs that a decoder actor requests from a cluster."""
    encoder_cpus: float = Field(1.0, gt=0)
    """CPUs that an encoder actor requests from a cluster."""
    threads: int | None = Field(None, ge=1)
    """Arithmetic threads of a CPU encoder. Default: CPU cores divided among the encoders."""
    chunk_frames: int = Field(16, ge=4)
    """Frames per encode step after the first frame; rounded down to the network's time stride."""
    batch: int | None = Field(None, ge=1)
    """Most chunks per encode step. Default: enough to use the device fully."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_switch)] = "auto"
    """Run the network through `torch.compile`: faster steps, after about a minute of compiling for each frame size and encoder. It needs a
    C++ compiler, on CUDA also Triton and a C compiler. Part of the fingerprint. `auto`: as the output was begun; a new output is
    compiled on CPUs where an estimate says that it pays."""
    frame_bytes: int = Field(512 * MiB, ge=16 * MiB)
    """Most bytes of decoded frames that wait for one encoder. A small network keeps less: a few encode steps."""
    state_bytes: int | None = Field(None, ge=MiB)
    """Most bytes of causal states on a GPU; clips that wait longest keep theirs in host memory. Default: half of the GPU's memory."""
    attempts: int = Field(3, ge=1)
    """Most attempts at a shard before it is given up."""
    shard_video_s: float = Field(1800.0, gt=0)
    """Seconds of video after which a group of plain files ends, so that a kill costs no more work; the rest becomes another shard."""
    credit: int = Field(2, ge=1, le=8)
    """Shards given to an encoder at a time; the next one is fetched while the current one finishes."""
    hang_s: float = Field(600.0, gt=0)
    """An encoder without progress for this many seconds is killed, and its shards go to another one."""
    outage_s: float = Field(3600.0, ge=0)
    """Seconds that a build waits for storage that does not answer or fails for every shard. Then it ends; the same command resumes."""


class NightlyConfig(Section):
    """Limits and policies of `lathe nightly`; other commands ignore them. Limits of its checks: as options of `lathe publish`."""

    max_hours: float | None = Field(None, gt=0)
    """Hours after which no further shard is started. Running shards are finished, and what is done is published."""
    max_shards: int | None = Field(None, ge=1)
    """Most shards of one night."""
    max_gpu_hours: float | None = Field(None, gt=0)
    """Hours that encoders are up, summed over them, after which no further shard is started. Each encoder has one GPU."""
    max_failed: int = Field(0, ge=0)
    """Most shards and inputs that are given up (unreadable, denied) in a night that still publishes the others. The night fails."""
    removed: Literal["keep", "drop"] = "keep"
    """Rows of inputs that are not listed any more: keep them, or drop them from the next snapshot."""
    new_corpus: Literal["refuse", "accept"] = "refuse"
    """A night of which no input is among those of the output: refuse it, or accept it, where each night lists other inputs."""
    max_removed: float = Field(0.5, ge=0, le=1)
    """Largest fraction of inputs or rows that `removed: drop` takes out at once."""
    max_drift: float = Field(0.5, ge=0)
    """Largest change of a channel's mean or standard deviation, in standard deviations."""
    canary: int = Field(4, ge=0)
    """Clips that are encoded again and compared; 0: none."""
    psnr_floor: float = Field(15.0, allow_inf_nan=False)
    """Lowest mean PSNR of these clips, dB."""
    ssim_floor: float = Field(0.3, allow_inf_nan=False)
    """Lowest mean SSIM of these clips."""
    delta: bool = True
    """Write the Delta Lake view of Parquet outputs as well."""
    report: bool = False
    """Store a page on each snapshot that is published, as `lathe publish --report`."""


BuildPoint = Literal[
    "after_fetch",
    "mid_video",
    "before_upload",
    "in_upload",
    "after_upload",
    "before_commit",
    "before_read_back",
    "in_clean_up",  # an attempt that lost or failed has deleted the first of its objects
    "after_commit",
]
PublishPoint = Literal["before_manifest", "before_snapshot", "after_snapshot"]
GcPoint = Literal[
    "in_retiring",  # a receipt is copied and not deleted yet
    "after_first_record",  # of a snapshot that is not kept
    "after_records",
    "before_data",
    "after_first_file",
]
DrillPoint = Literal[BuildPoint, PublishPoint, GcPoint, "in_load", "in_decoder", "in_training"]


class DrillConfig(Section):
    """Deliberate failure at a named point, to test that nothing is lost or doubled."""

    point: DrillPoint | None = None
    """Point of the failure; None: no failure."""
    action: Literal["kill", "crash", "hang", "raise", "device_error"] = "kill"
    """SIGKILL to the process itself, a segmentation fault, an endless sleep, a transient error, or an error as a GPU raises it."""
    times: int = Field(1, ge=1)
    """Number of failures, over all processes that share `marker_dir`."""
    marker_dir: str | None = None
    """Local folder where each failure leaves a file; required with `point`."""

    @model_validator(mode="after")
    def _marker(self) -> DrillConfig:
        if self.point is not None and self.marker_dir is None:
            raise ValueError("drill.point needs marker_dir, the folder where failures are counted")
        return self


class GcConfig(Section):
    """What `lathe gc` keeps. Encoding does not use it."""

    grace_hours: float = Field(48.0, ge=0)
    """Files, heartbeats and unfinished uploads that are younger are kept, hours. Longer than a shard, a publish and a silent build take."""
    keep_snapshots: int = Field(30, ge=1)
    """Newest snapshots that are kept."""
    keep_days: float = Field(30.0, ge=0)
    """Snapshots, run logs and reports of nights that are younger are kept as well, days. Longer than a training run."""


class EncodeJob(Section):
    """A build: inputs, output and all options. `docs/formats.md` names the fields that are part of the fingerprint."""

    inputs: Annotated[tuple[str, ...], BeforeValidator(_as_inputs)]
    """Tar shards or videos: paths, globs, braces `{000..999}`, folders, `s3://…` of the same, `@list.txt` (one per line), tables of them
    (`.parquet`, `.csv`, `.tsv`, `.jsonl`)."""
    output: str
    """Folder or `s3://bucket/prefix` of the latents."""
    model: ModelConfig = ModelConfig()
    annotations: Annotated[str, Field(min_length=1)] | None = None
    """Table (`.parquet`, `.csv`, `.tsv`, `.jsonl`) of captions, fields and spans of the inputs, a path or `s3://…`. It wins over texts
    beside the videos."""
    table: TableConfig = TableConfig()
    clips: ClipConfig = ClipConfig()
    images: ImageConfig = ImageConfig()
    members: dict[str, str] = Field(default_factory=dict)
    """Paired videos of one sample: name of a column and suffix of the file, `{video: mp4, control: depth.mp4, mask: mask.mp4}`. `video` is
    the main one, by default any video without one of the other suffixes. Each member is cut as the main video and its latent is a column;
    names that begin with `mask` are masks. Empty: each video is a sample."""
    unpaired: Literal["reject", "encode"] = "reject"
    """With `members`, videos that have none of them: reject (`no_members`), or encode as samples of their own, whose rows lack the columns
    of the members. Images beside paired videos need `encode`. A video with some of the members is rejected in either case."""
    decode: DecodeConfig = DecodeConfig()
    storage: StorageConfig = StorageConfig()
    write: WriteConfig = WriteConfig()
    engine: EngineConfig = EngineConfig()
    nightly: NightlyConfig = NightlyConfig()
    drill: DrillConfig = DrillConfig()
    gc: GcConfig = GcConfig()
    retry_rejects: Annotated[tuple[str, ...], BeforeValidator(as_list)] | None = None
    """Encode rejected inputs of finished shards again: those with one of these reasons, or with `()` those rejected by limits that differ
    in this job. None: retry nothing."""
    reject_budget: float = Field(0.05, ge=0, le=1)
    """Largest fraction of damaged inputs; beyond it the build stops. A single damaged input stops it only if this is 0. 1: no limit."""
    strict: bool = False
    """Refuse inputs whose folders, patterns or lists hold anything that is not encoded: another suffix, an image, a hidden file, a broken
    link, a caption without a video. Otherwise such entries are counted and reported."""
    allow_empty: bool = False
    """End with exit code 0 although nothing was encoded, now or by earlier runs. Otherwise such a build fails."""
    progress: Literal["auto", "rich", "plain", "json", "none"] = "auto"
    """`auto`: a live display on a terminal, plain lines otherwise."""

    def limits(self) -> dict[str, float]:
        """Options that reject inputs but cannot change a latent. They are not in the fingerprint, but in each receipt."""
        decode = ("max_pixels", "max_frames", "max_duration_s", "max_video_bytes", "timeout_s", "memory_bytes")
        return {f"decode.{name}": getattr(self.decode, name) for name in decode} | {"write.max_abs": self.write.max_abs}

    @model_validator(mode="after")
    def _one_gpu_an_actor(self) -> EncodeJob:
        if self.engine.executor == "ray" and self.model.device.startswith("cuda:"):
            raise ValueError(
                f"model.device: {self.model.device} cannot be chosen with Ray, where each encoder sees one GPU, named cuda; use "
                f"--device cuda and set CUDA_VISIBLE_DEVICES={self.model.device[5:]} before Ray starts, or --executor inline"
            )
        return self

    @property
    def member_rule(self) -> MemberRule:
        """`members` as the reader takes them."""
        others = tuple(sorted((name, suffix) for name, suffix in self.members.items() if name != MAIN))
        return MemberRule(others, self.members.get(MAIN, ""), bool(others) and self.unpaired == "encode")

    @model_validator(mode="after")
    def _members_of_videos(self) -> EncodeJob:
        if self.members and self.images.policy == "only":
            raise ValueError("members: pairs are videos, and images.policy is only; take keep, or leave out members")
        if self.members and self.images.policy == "keep" and self.unpaired == "reject":
            raise ValueError("members: images have none; set unpaired to encode, or images.policy to skip")
        return self

    @field_validator("members", mode="before")
    @classmethod
    def _members(cls, value: Any) -> Any:
        return value if not isinstance(value, dict) else check_members(value)

    @field_validator("inputs")
    @classmethod
    def _inputs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected at least one input")
        return value

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        if not value:
            raise ValueError(f"expected a folder or s3://bucket/prefix, got {value!r}")
        return value
