"""docs/configuration.md and docs/commands.md are what `make docs` writes from the code, and every option is described."""

import pytest
from pydantic import BaseModel

from docs import generate
from pipeline.cli.app import app
from pipeline.config import EncodeJob


@pytest.mark.parametrize("page", generate.PAGES)
def test_the_committed_page_is_the_generated_one(page):
    committed = (generate.DOCS / page).read_text(encoding="utf-8")
    if committed != generate.PAGES[page]():
        pytest.fail(f"docs/{page} differs from the code: run `make docs` and commit the result")


def test_a_field_without_a_docstring_is_refused():
    class Silent(BaseModel):
        knob: int = 1

    with pytest.raises(ValueError, match=r"Silent\.knob has no docstring"):
        generate.sections(Silent, "", {})


def test_every_option_of_a_job_and_every_command_has_its_line():
    text = generate.configuration()
    sections = {name: field.annotation for name, field in EncodeJob.model_fields.items()}
    keys = [
        f"{name}.{inner}" if issubclass(kind, BaseModel) else name
        for name, kind in sections.items()
        if isinstance(kind, type)
        for inner in (kind.model_fields if issubclass(kind, BaseModel) else [""])
    ]
    assert len(keys) > 50
    assert [key for key in keys if f"\n| `{key}` | " not in text] == []
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert [name for name in names if f"\n## {name}\n" not in generate.commands()] == []
