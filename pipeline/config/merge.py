"""Merge of defaults, a YAML file, flags and `--set` overrides into one validated job. An error names the invalid field in one line.

Later sources win: defaults < `--config` file < flags < `--set section.key=value`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from pipeline.config.section import Section
from pipeline.config.sections import EncodeJob
from pipeline.errors import ConfigError


def build_job(flags: dict[str, Any], *, config_path: str | None = None, overrides: tuple[str, ...] = ()) -> EncodeJob:
    """The job of defaults, a YAML file, flags (by dotted names; None: not given) and `section.key=value` overrides.

    Raises:
        ConfigError: an invalid field; the message names it, its value and what was expected.
    """
    return build(EncodeJob, flags, config_path=config_path, overrides=overrides)


def build(
    kind: type[Section], flags: dict[str, Any], *, config_path: str | None = None, overrides: tuple[str, ...] = ()
) -> Any:
    """Like `build_job`, for any kind of job."""
    values: dict[str, Any] = _read_yaml(config_path, kind) if config_path else {}
    for path, value in flags.items():
        if value is not None and value != () and value != []:
            _assign(values, path, value)
    for text in overrides:
        path, sep, raw = text.partition("=")
        if not sep or not path:
            raise ConfigError(f"--set {text}: expected section.key=value")
        _assign(values, path.strip(), _parse_yaml(raw, f"--set {text}"))
    return validate(kind, values)


def validate(kind: type[Section], values: dict[str, Any]) -> Any:
    """`kind(**values)`; invalid fields are a one-line ConfigError that names them."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error, kind)) from None


def _explain(error: ValidationError, kind: type[Section]) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(
            str(part)
            for part in item["loc"]
            if isinstance(part, int) or not part.startswith(("constrained", "literal"))
        )
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            section: Any = kind
            for part in item["loc"][:-1]:
                annotation = section.model_fields[part].annotation
                section = next((one for one in get_args(annotation) if hasattr(one, "model_fields")), annotation)
            message = f"no such field; known here: {', '.join(sorted(section.model_fields))}"
        elif item["type"] == "missing":
            message = "is required"
        elif "got" not in message:
            message = f"{message}, got {item['input']!r}"
        lines.append(f"{path}: {message}" if path else message)
    return "; ".join(dict.fromkeys(lines))


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section!r} is not a section")
    values[leaf] = value


def _read_yaml(path: str, kind: type[Section]) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"job file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"job file {path}: not UTF-8 text (byte {error.start})") from None
    loaded = _parse_yaml(text, f"job file {path}")
    if not isinstance(loaded, dict):
        raise ConfigError(f"job file {path}: expected a mapping of sections, got {type(loaded).__name__}")
    # A section whose lines are all comments is empty; keys that are not text become unknown fields.
    sections = {name for name, field in kind.model_fields.items() if isinstance(field.default, Section)}
    return {str(name): {} if value is None and name in sections else value for name, value in loaded.items()}


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None


def ray_address_from_environment() -> str | None:
    """`RAY_ADDRESS`, which `ray job submit` sets. Only this package reads the environment."""
    return os.environ.get("RAY_ADDRESS") or None
