"""Writes docs/configuration.md and docs/commands.md from the code: `make docs`. `tests/test_generated_docs.py` compares.

The configuration comes from the fields of the job and recipe classes (type, default, docstring), the commands from the typer app.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from model.training.objective_recipe import ADVERSARIAL_KEYS, OBJECTIVE_KEYS, TERMS, AdversarialRecipe, ObjectiveRecipe
from model.training.recipe import TrainingRecipe
from pipeline.cli.app import app
from pipeline.config import EmbedJob, EncodeJob
from pipeline.training.job import TrainJob

JOBS: dict[type[BaseModel], tuple[str, str]] = {
    EncodeJob: ("Encoding job", "For `lathe encode`, `plan`, `evaluate` and `check`."),
    EmbedJob: ("Embedding job", "For `lathe embed` ([sidecars.md](sidecars.md)), which takes a job file of its own."),
    TrainJob: ("Training job", "For `lathe train`. How to train: [training.md](training.md)."),
    TrainingRecipe: ("Training recipe", "`recipe` of a training job names one; `overrides` changes its values."),
}
DOCS = Path(__file__).parent
MiB = 1024 * 1024
NOTICE = "<!-- Written by `make docs` from the code. Do not edit. -->\n"
BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping", type(None): "null"}

CONFIGURATION = """# Configuration

Every option of a job: name, type, default, meaning. Set an option in a job file (YAML), with the flag of a [command](commands.md), or with
`--set section.key=value`. Flags and `--set` win over the file. An unknown name or a wrong value ends the command with exit code 2 before
anything starts.

```yaml
# lathe encode --config job.yaml
inputs: ["s3://corpus/{000..999}.tar"]
output: s3://latents/build
model: {name: leanvae-dim16, checkpoint: s3://weights/LeanVAE-dim16.ckpt}
clips: {fps: 16, frames: [81], size: [480x832], select: tile}
engine: {decoders: 24}
```
"""

COMMANDS = """# Commands

`lathe COMMAND --help` prints the same. Exit codes: 0 done; 1 started and failed; 2 the command or its configuration is wrong and nothing
was started; 130 stopped by a signal. Every option of a job, also those without a flag: [configuration.md](configuration.md).
"""


def configuration() -> str:
    """The text of docs/configuration.md. Raises ValueError for a field without a docstring."""
    described: dict[type[BaseModel], str] = {}
    parts = [NOTICE + CONFIGURATION]
    for kind, (title, about) in JOBS.items():
        parts += [f"# {title}\n\n{about}\n", *sections(kind, "", described)]
    for key, kind, texts in (
        ("objective", ObjectiveRecipe, OBJECTIVE_KEYS),
        ("objective.adversarial", AdversarialRecipe, ADVERSARIAL_KEYS),
    ):
        # in the order of the texts; a key without one, or a text without its key, is an error
        fields = {item.name: item for item in dataclasses.fields(kind)}
        if fields.keys() != texts.keys():
            raise ValueError(
                f"{kind.__name__} and its texts have different keys: {sorted(fields.keys() ^ texts.keys())}"
            )
        rows = [(f"`{name}`", _default(fields[name]), text) for name, text in texts.items()]
        parts += [f"## `stages[].{key}`\n", table("key", "default", "meaning", rows=rows)]
    terms = [(f"`{name}`", text) for name, text in TERMS.items()]
    parts += ["## Terms of `stages[].objective.terms`\n\nEach takes a weight.\n", table("term", "measures", rows=terms)]
    return "\n".join(parts)


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(item.default)}`"


def sections(kind: type[BaseModel], prefix: str, described: dict[type[BaseModel], str]) -> list[str]:
    """Markdown of a section and of those inside it. `prefix` is the path of its keys, such as `clips.`."""
    title = f"`{prefix.rstrip('.')}`" if prefix else f"`{kind.__name__}`"
    if kind in described:
        return [f"## {title}\n\nThe keys of {described[kind]} above.\n"]
    described[kind] = title
    rows, inner = [], []
    for name, field in kind.model_fields.items():
        nested = section_of(field.annotation)
        if nested is not None:
            several = "[]" if get_origin(field.annotation) is tuple else ""
            inner += sections(nested, f"{prefix}{name}{several}.", described)
            if not field.description and not field.is_required():
                continue
        elif not field.description:
            raise ValueError(f"{kind.__name__}.{name} has no docstring; write one below the field: meaning and unit")
        meaning = " ".join((field.description or f"Section {prefix}{name}, below.").split())
        kinds = type_of(field.annotation, field.metadata)
        rows.append((f"`{prefix}{name}`", kinds, default_of(name, field), meaning))
    about = " ".join((kind.__doc__ or "").split())
    return [f"## {title}\n\n{about}\n", table("key", "type", "default", "meaning", rows=rows), *inner]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class that a field holds, alone, as optional or in a list; else None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [section_of(part) for part in get_args(annotation) if not isinstance(part, str)]
    return next((part for part in found if part), None)


def type_of(annotation: Any, constraints: Any = ()) -> str:
    """A type in words, with its bounds: `integer >= 1, or null`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(parts[0], (*parts[1:], *constraints))
    if origin in (Union, types.UnionType):
        return ", or ".join(type_of(part, constraints if part is not type(None) else ()) for part in parts)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in flat(parts))
    if origin is tuple:
        return f"list of {type_of(parts[0])}" if parts[-1] is ... else f"list of {len(parts)} {type_of(parts[0])}s"
    text = NAMES.get(origin or annotation, "mapping")
    limits = [item for given in constraints for item in getattr(given, "metadata", [given])]
    bounds = [
        form.format(number(getattr(item, name)))
        for item in limits
        for name, form in BOUNDS.items()
        if hasattr(item, name)
    ]
    return " ".join([text, ", ".join(bounds)]).strip() if text in ("integer", "number") else text


def flat(values: Any) -> list[Any]:
    """The values of a Literal that may hold other Literals."""
    return [inner for value in values for inner in (flat(get_args(value)) if get_args(value) else [value])]


def default_of(name: str, field: FieldInfo) -> str:
    """The default as it would stand in a job file; byte counts also in MiB."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{number(value)} ({value // MiB} MiB)" if name.endswith("_bytes") and value >= MiB else number(value)
    return json.dumps(value)


def number(value: float) -> str:
    """`180.0` -> `180`, `1e7` -> `10000000`."""
    return str(int(value)) if value == int(value) else f"{value:g}"


def commands() -> str:
    """The text of docs/commands.md."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("lathe", ["--help"], resilient_parsing=True)
    return "\n".join([NOTICE + COMMANDS, *commands_of(group, context)])


def commands_of(group: Any, context: Any, before: str = "") -> Iterator[str]:
    """The commands of a group, and those of groups in it."""
    for name, parsed in group.commands.items():
        if hasattr(parsed, "commands"):
            inner = type(context)(parsed, info_name=name, parent=context)
            yield from commands_of(parsed, inner, f"{before}{name} ")
        else:
            yield command(f"{before}{name}", parsed, context)


def command(name: str, parsed: Any, parent: Any) -> str:
    """One command: usage, what it does, its arguments and options."""
    context = type(parent)(parsed, info_name=name, parent=parent)
    arguments = [item for item in parsed.params if item.param_type_name == "argument"]
    usage = ["lathe", name, *(f"{item.metavar or item.name.upper()}" for item in arguments), "[OPTIONS]"]
    records = [item.get_help_record(context) for item in (*arguments, *parsed.params) if item.name != "help"]
    rows = dict((f"`{left}`", " ".join(right.split())) for left, right in filter(None, records))
    lines = [f"## {name}", "", " ".join((parsed.help or "").split()), "", f"    {' '.join(usage)}", ""]
    return "\n".join([*lines, table("argument or option", "meaning", rows=list(rows.items()))])


def table(*heads: str, rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, tuple("---" for _ in heads), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


PAGES = {"configuration.md": configuration, "commands.md": commands}


if __name__ == "__main__":
    for page, text in PAGES.items():
        (DOCS / page).write_text(text(), encoding="utf-8")
