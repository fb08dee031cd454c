"""Options of a job: defaults, YAML, flags and `--set` become one frozen `EncodeJob`. No torch, no Ray.

- `sections`, `clips`, `images`, `tables`: the options with type, unit, default and meaning, and their validation; those of `clips.`,
  `images.` and `table.`
- `members`: check of the names and suffixes of paired videos
- `embedding`: the options of `lathe embed`
- `section`: what groups of options have in common
- `merge`: combines defaults, YAML, flags and overrides
"""

from pipeline.config.clips import ClipConfig, Fps, parse_bucket, parse_size
from pipeline.config.embedding import EmbedJob
from pipeline.config.images import ImageConfig
from pipeline.config.merge import build, build_job, ray_address_from_environment, validate
from pipeline.config.section import Section
from pipeline.config.sections import (
    EMBEDDED,
    BuildPoint,
    DecodeConfig,
    DrillConfig,
    DrillPoint,
    EncodeJob,
    EngineConfig,
    GcConfig,
    MiB,
    ModelConfig,
    NightlyConfig,
    StorageConfig,
    WriteConfig,
)
from pipeline.config.tables import TableConfig

__all__ = [
    "EMBEDDED",
    "BuildPoint",
    "ClipConfig",
    "DecodeConfig",
    "DrillConfig",
    "DrillPoint",
    "EmbedJob",
    "EncodeJob",
    "EngineConfig",
    "Fps",
    "GcConfig",
    "ImageConfig",
    "MiB",
    "ModelConfig",
    "NightlyConfig",
    "Section",
    "StorageConfig",
    "TableConfig",
    "WriteConfig",
    "build",
    "build_job",
    "parse_bucket",
    "parse_size",
    "ray_address_from_environment",
    "validate",
]
