"""Options of a training job: YAML, flags and `--set` become one frozen `TrainJob` and its recipe.

Decoding and fetching use the sections of an encoding job (`decode`, `storage`), with the same meaning. What is trained, on how
many clips of which size, is in the recipe (`model.training.recipe`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config import DecodeConfig, DrillConfig, Fps, Section, StorageConfig, build
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from model.training.recipe import TrainingRecipe

MiB = 1024 * 1024


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_features(value: Any) -> Any:
    return {"features": value} if isinstance(value, str) else value


class RandomClipConfig(Section):
    """How clips are drawn from a video: at any moment and position, scaled within bounds."""

    fps: Fps = "source"
    """Sampling rate by presentation time, or `source`: every frame. Images are any frame."""
    min_fps_ratio: float = Field(0.9, ge=0, le=1)
    """Sources slower than this fraction of `fps` are not used (`fps_too_low`), because their frames would repeat."""
    scale: tuple[float, float] = (1.0, 2.0)
    """Smallest and largest scaled frame, as a multiple of the frame that just covers the clip; the clip is a random crop of it."""
    min_side: int = Field(1, ge=1)
    """Videos whose shorter side is smaller are not used (`too_small`). Pixels."""
    upscale: bool = False
    """Allow enlarging videos smaller than the clip. Otherwise they are not used (`too_small`)."""

    @field_validator("scale")
    @classmethod
    def _scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not (1 <= value[0] <= value[1] and math.isfinite(value[1])):
            raise ValueError(f"expected two increasing factors of at least 1, such as [1, 2], got {list(value)}")
        return value


class SyntheticConfig(Section):
    """Clips of `pipeline.synthetic_videos`."""

    seed: int = Field(0, ge=0)
    """Another seed gives other clips."""


class DataConfig(Section):
    """Source of clips: generated, or cut from videos."""

    synthetic: SyntheticConfig | None = None
    """Generated videos, without end, for example `{seed: 0}`."""
    inputs: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] | None = None
    """Tar shards or videos, as for `encode`: paths, globs, braces, folders, `s3://…` of the same, `@list.txt`. Only uncompressed tars."""
    clips: RandomClipConfig = RandomClipConfig()
    seed: int = Field(0, ge=0)
    """For the order of videos, and for moments, scales and positions."""
    cache_bytes: int = Field(256 * MiB, ge=0)
    """Most bytes of fetched videos that each loading process caches."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.synthetic is None) == (self.inputs is None):
            got = "neither" if self.inputs is None else "both"
            raise ValueError(f"expected either synthetic: {{seed: 0}} or inputs: [shards, folders, …], got {got}")
        if self.inputs is not None and not self.inputs:
            raise ValueError("expected at least one input, got []")
        return self


class LPIPSConfig(Section):
    """Weights of the perceptual distance; a plain string sets `features`."""

    features: str = Field(min_length=1)
    """VGG16 of torchvision or of the lpips package: path, `s3://…` or `hf://owner/repo/file`."""
    heads: str | None = None
    """The package's five linear layers, if the first file does not contain them."""


class TrainJob(Section):
    """Options of a training run."""

    recipe: str | dict[str, Any]
    """Name of a recipe, its file, or the mapping itself."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the recipe: mappings by key, stages by name (`stages: {reconstruction: {steps: 100}}`), other values replaced."""
    data: DataConfig
    output: str = Field(min_length=1)
    """Folder of the run; with several machines, one that all of them share. The same job again continues from there."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if there is one."""
    workers: int = Field(1, ge=1)
    """Training processes, each with a GPU if there are any. More than one run through Ray Train."""
    ray: bool = False
    """Use Ray Train also for a single process, which restarts it if it dies."""
    address: str | None = None
    """Ray cluster to join. Without it `RAY_ADDRESS` if set, else a private local Ray."""
    worker_cpus: float = Field(1.0, gt=0)
    """CPUs that a training process requests from a cluster; its loaders share them."""
    restarts: int = Field(3, ge=0)
    """Times that Ray Train restarts from the last checkpoint after a process died or a disk failed."""
    loaders: int = Field(1, ge=0)
    """Processes that load clips, per training process; 0: the training process loads them."""
    lpips: Annotated[LPIPSConfig | None, BeforeValidator(_as_features)] = None
    """For recipes with a perceptual term."""
    decode: DecodeConfig = DecodeConfig()
    storage: StorageConfig = StorageConfig()
    drill: DrillConfig = DrillConfig()
    """Point `in_training`: after a step was logged, in the process that writes the folder."""
    progress: Literal["auto", "plain", "json", "none"] = "auto"
    """Lines on stderr, JSON lines on stdout, or nothing. `auto`: lines."""

    @field_validator("decode")
    @classmethod
    def _decode(cls, value: DecodeConfig) -> DecodeConfig:
        if value.device != "cpu":
            raise ValueError(f"training decodes on the CPU, got device {value.device}; leave it out")
        return value

    @field_validator("recipe", mode="before")
    @classmethod
    def _recipe(cls, value: Any) -> Any:
        if not isinstance(value, (str, dict)) or not value:
            raise ValueError(f"expected a recipe's name, its file, or a mapping, got {value!r}")
        return value

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        if "://" in value and not value.startswith("file://"):
            raise ValueError(
                f"expected a folder, local or on a file system that all machines share, got {value!r}; a run "
                "appends to its files, so copy it to an object store afterwards"
            )
        return value

    @property
    def distributed(self) -> bool:
        """Whether Ray Train runs the job."""
        return self.ray or self.workers > 1


def build_train_job(
    flags: dict[str, Any], *, config_path: str | None = None, overrides: tuple[str, ...] = ()
) -> TrainJob:
    """As `pipeline.config.build_job`. Raises ConfigError naming the field, what was got, what was expected."""
    job: TrainJob = build(TrainJob, flags, config_path=config_path, overrides=overrides)
    return job


def recipe_of(job: TrainJob) -> TrainingRecipe:
    """Recipe of a job.

    Raises:
        ConfigError: unknown recipe, or an impossible key or value.
    """
    from model.training.recipe import load_recipe, overridden, training_recipe

    try:
        if isinstance(job.recipe, str):
            return load_recipe(job.recipe, job.overrides)
        return training_recipe(overridden(job.recipe, job.overrides))
    except (FileNotFoundError, ValueError) as error:
        message = str(error)
        raise ConfigError(message if message.startswith("recipe") else f"recipe: {message}") from None
    except OSError as error:
        raise ConfigError(f"recipe: {job.recipe} cannot be read: {error.strerror}") from None
