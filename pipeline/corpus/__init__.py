"""Resolution of the inputs that a user names into shards. Objects are listed, never opened.

Takes paths, folders, globs, braces and list files, local or `s3://…`. Returns `Shard`s in a fixed order, each object once. Raises one
`InputError` that lists the inputs without match and what their folders contain. Each tar is a shard; plain videos and images are grouped
into virtual shards.

- In a pattern, `*` and `?` do not match `/`, `**` does. A folder that matches is taken with everything in it.
- `@list` (or a plain `.txt`/`.list`) names one input per line. A line that begins with `#` is a comment, unless a file has that name.
  Relative lines are relative to the list's folder, or to the current one if the first of them is not in the list's folder.
- Other contents of folders and patterns are counted in `PassedOver`: other suffixes, hidden files, broken links, fifos, folders that may
  not be read, captions without a video.

- `search`: inputs looked up in their stores
- `listing`, `lists`, `patterns`: one folder or pattern; list files; braces and globs
- `kinds`, `texts`, `passed_over`: kind of a file by its name; captions without a video; counts of what is not encoded
- `grouping`: plain videos and images as shards
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.corpus.grouping import group_files, tar_shard
from pipeline.corpus.kinds import TAR_SUFFIXES, is_text, media_kind, suffix
from pipeline.corpus.passed_over import PassedOver
from pipeline.corpus.search import Search
from pipeline.corpus.texts import CAPTION
from pipeline.records import named_caption

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import StorageConfig
    from pipeline.records import ImagePolicy, Shard, SourceObject

__all__ = ["TAR_SUFFIXES", "PassedOver", "group_files", "media_kind", "resolve_inputs"]


def resolve_inputs(
    inputs: Iterable[str],
    config: StorageConfig,
    passed_over: PassedOver | None = None,
    images: ImagePolicy = "skip",
) -> list[Shard]:
    """Shards of all objects that `inputs` name: tars in the order named, then groups of plain videos, then of images.

    Other contents of folders, patterns and lists are counted in `passed_over`.

    Raises:
        InputError: an input matches nothing, a named object is missing, a list cannot be read.
        AccessError: a bucket or folder cannot be listed.
    """
    passed_over = PassedOver() if passed_over is None else passed_over
    search = Search(config, passed_over, images)
    found: dict[str, SourceObject] = {}
    for text in _without_texts([text.strip() for text in inputs], images):
        for source in search.input(text):
            found.setdefault(source.uri, source)
    sources = _without_thumbnails(list(found.values()), passed_over)
    passed_over.taken = len(sources)
    tars = [tar_shard(source) for source in sources if media_kind(source.uri) == "tar"]
    return tars + group_files((source for source in sources if media_kind(source.uri) != "tar"), config)


def _without_texts(inputs: list[str], images: ImagePolicy) -> list[str]:
    """`inputs` without captions and JSON of videos and images among them: a shell expands `folder/*` to both."""
    stems = {os.path.splitext(text)[0] for text in inputs if media_kind(text, images) in ("video", "image")}
    return [text for text in inputs if not (is_text(text) and stems & _stems_of(text))]


def _stems_of(text: str) -> set[str]:
    """Stems of the videos that a caption or JSON may belong to."""
    stem = os.path.splitext(text)[0]
    named = named_caption(stem)
    return {stem, stem.removesuffix(CAPTION), *(named or ())[:1]}


def _without_thumbnails(sources: list[SourceObject], passed_over: PassedOver) -> list[SourceObject]:
    """`sources` without images that have the name of a video among them, as those that downloaders write beside it."""
    videos = {os.path.splitext(source.uri)[0] for source in sources if media_kind(source.uri) == "video"}
    kept = []
    for source in sources:
        if media_kind(source.uri) is None and os.path.splitext(source.uri)[0] in videos:
            passed_over.add(source.uri, suffix(source.uri), "images beside a video of the same name are not encoded")
        else:
            kept.append(source)
    return kept
