"""Resolution of the inputs that a user names into shards. Objects are listed, never opened.

Takes paths, folders, globs, braces and list files, local or `s3://…`. Returns `Shard`s in a fixed order, each object once. Raises one
`InputError` that lists the inputs without match and what their folders contain. Each tar is a shard; plain videos and images are grouped
into virtual shards.

- In a pattern, `*` and `?` do not match `/`, `**` does. A folder that matches is taken with everything in it.
- `@list` (or a plain `.txt`/`.list`) names one input per line. A line that begins with `#` is a comment, unless a file has that name.
  Relative lines are relative to the list's folder, or to the current one if the first of them is not in the list's folder.
- A table names one video or tar per row, with captions, fields and spans.
- Other contents of folders and patterns are counted in `PassedOver`: other suffixes, hidden files, broken links, fifos, folders that may
  not be read, captions without a video.

- `search`: inputs looked up in their stores
- `listing`, `lists`, `patterns`: one folder or pattern; list files; braces and globs
- `kinds`, `texts`, `passed_over`: kind of a file by its name; captions without a video; counts of what is not encoded
- `tables`, `annotations`: rows of tables; their digests as part of the identity of inputs
- `grouping`, `members`: plain videos and images as shards; paired videos as members of a source
"""

from __future__ import annotations

import os
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config import TableConfig
from pipeline.corpus.annotations import Annotations, job_annotations
from pipeline.corpus.grouping import group_files, tar_shard
from pipeline.corpus.kinds import TAR_SUFFIXES, is_text, media_kind, suffix
from pipeline.corpus.members import identified, with_members
from pipeline.corpus.passed_over import PassedOver
from pipeline.corpus.search import Search
from pipeline.corpus.tables import is_table
from pipeline.corpus.texts import CAPTION
from pipeline.records import named_caption

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.config import StorageConfig
    from pipeline.records import ImagePolicy, MemberRule, Shard, SourceObject

__all__ = [
    "TAR_SUFFIXES",
    "Annotations",
    "PassedOver",
    "group_files",
    "job_annotations",
    "media_kind",
    "resolve_inputs",
]


def resolve_inputs(
    inputs: Iterable[str],
    config: StorageConfig,
    passed_over: PassedOver | None = None,
    images: ImagePolicy = "skip",
    annotations: Annotations | None = None,
    members: MemberRule | None = None,
) -> list[Shard]:
    """Shards of all objects that `inputs` name: tars in the order named, then groups of plain videos, then of images.

    Other contents of folders, patterns, lists and tables are counted in `passed_over`. `annotations` gets the rows of tables, for those
    who read the shards; by default their digests alone are made. `members`: plain videos that are members of the sample of another one are
    no inputs of their own.

    Raises:
        InputError: an input matches nothing, a named object is missing, a list or table cannot be read, no row of a table of
            inputs names one, or of the table of annotations is about one.
        ConfigError: a table lacks a column that the job names.
        AccessError: a bucket or folder cannot be listed.
    """
    if annotations is None:
        with Annotations(TableConfig(), config, "clips") as own:
            return resolve_inputs(inputs, config, passed_over, images, own, members)
    passed_over = PassedOver() if passed_over is None else passed_over
    search = Search(config, passed_over, images)
    found: dict[str, SourceObject] = {}
    for text in _without_texts([text.strip() for text in inputs], images):
        table = dict.fromkeys(_rows(text, search, annotations)) if is_table(text) else None
        for source in search.input(text) if table is None else search.rows(text, table):
            found.setdefault(source.uri, source)
    if annotations.table is not None:
        deque(_rows(annotations.table, search, annotations), maxlen=0)
    sources = _without_thumbnails(list(found.values()), passed_over, search.left_out)
    passed_over.taken = len(sources)
    if members:
        sources = with_members(sources, members, search.existing)
    tars = [tar_shard(source) for source in sources if media_kind(source.uri) == "tar"]
    plain = group_files((source for source in sources if media_kind(source.uri) != "tar"), config)
    return identified(annotations.attach(tars + plain, all_of=annotations.table))


def _rows(text: str, search: Search, annotations: Annotations) -> Iterator[str]:
    """Reads a table; the URI of each row."""
    for table in search.tables(text):
        yield from annotations.read(table, partial(search.uri_in, table.uri.rpartition("/")[0]))


def _without_texts(inputs: list[str], images: ImagePolicy) -> list[str]:
    """`inputs` without captions and JSON of videos and images among them: a shell expands `folder/*` to both."""
    stems = {os.path.splitext(text)[0] for text in inputs if media_kind(text, images) in ("video", "image")}
    return [text for text in inputs if not (is_text(text) and stems & _stems_of(text))]


def _stems_of(text: str) -> set[str]:
    """Stems of the videos that a caption or JSON may belong to."""
    stem = os.path.splitext(text)[0]
    named = named_caption(stem)
    return {stem, stem.removesuffix(CAPTION), *(named or ())[:1]}


def _without_thumbnails(sources: list[SourceObject], passed_over: PassedOver, left_out: set[str]) -> list[SourceObject]:
    """`sources` without images that have the name of a video among them, or among those `left_out`, as downloaders write them beside it."""
    images = {os.path.splitext(source.uri)[0] for source in sources if media_kind(source.uri) is None}
    if not images:  # of millions of videos no set of names is made
        return sources
    stems = (os.path.splitext(source.uri)[0] for source in sources if media_kind(source.uri) == "video")
    videos = {stem for stem in stems if stem in images} | (images & left_out)
    kept = []
    for source in sources:
        if media_kind(source.uri) is None and os.path.splitext(source.uri)[0] in videos:
            passed_over.add(source.uri, suffix(source.uri), "images beside a video of the same name are not encoded")
        else:
            kept.append(source)
    return kept
