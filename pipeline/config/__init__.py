"""Options of a job: defaults, YAML, flags and `--set` become one frozen `EncodeJob`. No torch, no Ray.

- `sections`: the options with type, unit, default and meaning, and their validation
- `merge`: combines defaults, YAML, flags and overrides
"""

from pipeline.config.merge import build, build_job, ray_address_from_environment, validate
from pipeline.config.sections import (
    EMBEDDED,
    BuildPoint,
    ClipConfig,
    DecodeConfig,
    DrillConfig,
    DrillPoint,
    EncodeJob,
    EngineConfig,
    Fps,
    GcConfig,
    MiB,
    ModelConfig,
    NightlyConfig,
    Section,
    StorageConfig,
    WriteConfig,
    parse_bucket,
    parse_size,
)

__all__ = [
    "EMBEDDED",
    "BuildPoint",
    "ClipConfig",
    "DecodeConfig",
    "DrillConfig",
    "DrillPoint",
    "EncodeJob",
    "EngineConfig",
    "Fps",
    "GcConfig",
    "MiB",
    "ModelConfig",
    "NightlyConfig",
    "Section",
    "StorageConfig",
    "WriteConfig",
    "build",
    "build_job",
    "parse_bucket",
    "parse_size",
    "ray_address_from_environment",
    "validate",
]
