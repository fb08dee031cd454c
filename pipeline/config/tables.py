"""Section `table` of an `EncodeJob`: the columns of tables of inputs and of annotations."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from pipeline.config.section import Section, as_list

Column = Annotated[str, Field(min_length=1)] | None


class TableConfig(Section):
    """Columns of the tables among `inputs`, and of `annotations`."""

    source: Column = None
    """Path or URI of the tar or video that a row is about; relative paths begin at the table's folder. Default: the first that the table
    has of `source`, `source_uri`, `path`, `uri`, `file`, `file_name`, `video`, `video_path`, `media_path`."""
    key: Column = None
    """Key of the sample in its tar; plain videos need none. Default: the first that the table has of `key`, `source_key`, `__key__`."""
    captions: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Captions, the first of which becomes `caption`; `caption_names` of the rows are the columns. Default: `caption`, `text`, `prompt` and
    `captions`, as in the JSON of a sample."""
    start: Column = None
    """Start of the span that a row is about, with `clips.select` `spans`. Default: `start`, if the table has it."""
    end: Column = None
    """End of that span. Default: `end`, if the table has it."""
    fields: Annotated[tuple[str, ...], BeforeValidator(as_list)] | None = None
    """Columns that go into `metadata` of the rows. Default: all others but binary ones. A change of their values encodes again."""
