"""What the user named becomes shards: objects listed, never opened.

Enters: paths, folders, globs, braces, list files, `s3://…` of the same. Leaves: `Shard`s in a fixed order, each object once, or one error
that names what matched nothing and what is there instead. Tars are shards of their own; plain videos are grouped into virtual ones.

- A pattern's `*` and `?` stop at `/`, `**` does not; a folder that matches is taken with everything in it.
- `@list` (or a plain `.txt`/`.list`) names one input a line, `#` starts a comment. Relative lines are relative to the list's folder, or to
  the current one if the first of them is not there.
- Hidden files, AppleDouble `._x` and `__MACOSX` are passed over in folders and patterns.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Literal

from braceexpand import braceexpand

from pipeline.errors import InputError, NotFound
from pipeline.records import VIDEO_EXTENSIONS, Shard, SourceObject
from pipeline.storage import ObjectInfo, Store, local_path, open_store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import StorageConfig

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LIST_SUFFIXES = (".txt", ".list")
WILDCARD = re.compile(r"[*?\[]")
MOST_EXPANSIONS = 1_000_000
MOST_LISTS = 8  # list files within list files
LOOK_UP_ONE_BY_ONE = 8  # names in one folder; more of them are looked up by one listing
NAMED_IN_ERRORS = 5


def resolve_inputs(inputs: Iterable[str], config: StorageConfig) -> list[Shard]:
    """Every object that `inputs` name, as shards: tars in the order named, then plain videos in groups.

    Raises:
        InputError: an input matches nothing, a named object is missing, a list cannot be read.
        AccessError: a bucket or folder refuses to be listed.
    """
    search = _Search(config)
    found: dict[str, SourceObject] = {}
    for text in inputs:
        for source in search.input(text.strip()):
            found.setdefault(source.uri, source)
    tars = [_tar(source) for source in found.values() if media_kind(source.uri) == "tar"]
    videos = [source for source in found.values() if media_kind(source.uri) == "video"]
    return tars + group_files(videos, config)


def group_files(objects: Iterable[SourceObject], config: StorageConfig) -> list[Shard]:
    """Plain videos, sorted by URI, as virtual shards of consecutive files, named after the folder they share.

    A group ends at `files_per_shard` files or before it would pass `shard_bytes`; a larger file is a group of its own.
    """
    groups: list[list[SourceObject]] = []
    group_bytes = 0
    for source in sorted(objects, key=lambda source: source.uri):
        full = groups and (len(groups[-1]) >= config.files_per_shard or group_bytes + source.size > config.shard_bytes)
        if not groups or full:
            groups.append([])
            group_bytes = 0
        groups[-1].append(source)
        group_bytes += source.size
    return [Shard("files", f"{_shared_folder(group)}/videos-{n:05d}", tuple(group)) for n, group in enumerate(groups)]


def media_kind(name: str) -> Literal["tar", "video"] | None:
    """What a file is by its name."""
    lower = name.lower()
    if lower.endswith(TAR_SUFFIXES):
        return "tar"
    return "video" if lower.rpartition("/")[2].rpartition(".")[2] in VIDEO_EXTENSIONS and "." in lower else None


class _Search:
    """One resolution: stores by root, so that each bucket is greeted once."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._stores: dict[str, Store] = {}

    def input(self, text: str, depth: int = 0) -> list[SourceObject]:
        """All objects of one input."""
        if not text:
            raise InputError("an input is empty; expected a path, a pattern, @list.txt or s3://bucket/prefix")
        if text.startswith("@") or (text.lower().endswith(LIST_SUFFIXES) and not WILDCARD.search(text)):
            return self._list_file(text.removeprefix("@"), depth)
        return self._patterns(text, self._expand(text))

    def _list_file(self, text: str, depth: int) -> list[SourceObject]:
        store, key = self._split(text)
        if depth == MOST_LISTS:
            raise InputError(f"@{text}: lists within lists, {MOST_LISTS} deep; does one name itself?")
        try:
            lines = store.read(key).decode("utf-8-sig").splitlines()
        except NotFound:
            raise InputError(f"list file {text} does not exist") from None
        except UnicodeDecodeError:
            raise InputError(f"list file {text} is not UTF-8 text; expected one input a line") from None
        texts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        base = _base(os.path.dirname(store.uri(key)), texts)
        found: list[SourceObject] = []
        plain: list[str] = []  # looked up together: a list may have a hundred thousand lines
        for line in [*texts, None]:
            if line is not None and not line.startswith("@") and not line.lower().endswith(LIST_SUFFIXES):
                plain += self._expand(_joined(base, line))
                continue
            found += self._patterns(f"@{text}", plain)
            plain = []
            if line is not None:
                found += self.input("@" + _joined(base, line.removeprefix("@")), depth + 1)
        if not found:
            raise InputError(f"list file {text} names nothing; expected one input a line")
        return found

    def _patterns(self, origin: str, patterns: list[str]) -> list[SourceObject]:
        """Objects of names, folders and patterns without braces, in order. `origin` is what the user wrote."""
        literal = [not WILDCARD.search(pattern) or self._exists(pattern) for pattern in patterns]
        places = [self._split(pattern, wild=not plain) for pattern, plain in zip(patterns, literal, strict=True)]
        known = self._look_up([place for place, plain in zip(places, literal, strict=True) if plain])
        found: list[SourceObject] = []
        missing: list[str] = []
        for pattern, (store, key), plain in zip(patterns, places, literal, strict=True):
            if (info := known.get((store.root, key))) is not None:
                if media_kind(key) is None:
                    raise InputError(
                        f"{pattern}: no tar shard or video by its name; expected .tar, .tar.gz, .mp4, .webm, …"
                    )
                found.append(_source(store, info))
            elif not plain:
                found += self._wildcards(store, key, pattern)
            elif inside := self._folder(store, key, pattern):
                found += inside
            else:
                missing.append(pattern)
        if missing:
            raise InputError(self._missing_message(origin, missing, len(patterns)))
        return found

    def _expand(self, text: str) -> list[str]:
        """Names without braces; a name that happens to hold some is itself."""
        return _expand_braces(text) if "{" in text and not self._exists(text) else [text]

    def _exists(self, text: str) -> bool:
        """Whether there is an object of just this name, whatever pattern characters it holds."""
        if "://" not in text:
            return os.path.exists(local_path(text))
        store, key = self._split(text)
        return bool(key) and not key.endswith("/") and _stat(store, key) is not None

    def _look_up(self, places: list[tuple[Store, str]]) -> dict[tuple[str, str], ObjectInfo]:
        """Which names exist: few by asking for each, many of one folder by one listing of what they begin with."""
        wanted: dict[tuple[str, str], set[str]] = {}
        for store, key in places:
            if key and not key.endswith("/"):
                wanted.setdefault((store.root, key.rpartition("/")[0]), set()).add(key)
        known: dict[tuple[str, str], ObjectInfo] = {}
        for (root, _), keys in wanted.items():
            store = self._stores[root]
            if len(keys) > LOOK_UP_ONE_BY_ONE:
                lowest, highest = min(keys), max(keys)
                shared = next((n for n, (a, b) in enumerate(zip(lowest, highest, strict=False)) if a != b), len(lowest))
                infos = [info for info in store.list(lowest[:shared], recursive=False) if info.key in keys]
            else:
                infos = [info for key in keys if (info := _stat(store, key))]
            known.update({(root, info.key): info for info in infos})
        return known

    def _folder(self, store: Store, key: str, pattern: str) -> list[SourceObject]:
        """Everything below a folder or prefix; nothing if there is no such folder."""
        if media_kind(key) and not (store.root == "/" and os.path.isdir(f"/{key}")):
            return []  # a file that is not there; a thousand of them are not worth a thousand listings
        prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
        names: Counter[str] = Counter()
        found = []
        for info in store.list(prefix):
            hidden = _hidden(info.key[len(prefix) :])
            names["(hidden)" if hidden else _suffix(info.key)] += 1
            if media_kind(info.key) and not hidden:
                found.append(_source(store, info))
        if names and not found:
            raise InputError(f"{pattern}: no tar shards or videos in it; it holds {_tally(names)}")
        if not names and store.root == "/" and os.path.isdir(f"/{key}"):
            raise InputError(f"{pattern}: the folder is empty; expected tar shards or videos")
        return found

    def _wildcards(self, store: Store, key: str, pattern: str) -> list[SourceObject]:
        """Objects that match, or lie in a folder that matches."""
        first = WILDCARD.search(key)
        fixed = key[: first.start()] if first else key
        folder = fixed.rpartition("/")[0]
        only_last = "/" not in key[len(fixed) :]
        matcher = re.compile(_pattern_regex(key) + r"(?:/.*)?")
        names: Counter[str] = Counter()
        found = []
        for info in store.list(fixed, recursive=not (only_last and media_kind(key))):
            if not matcher.fullmatch(info.key) or _hidden(info.key[len(folder) :]):
                continue
            names[_suffix(info.key)] += 1
            if media_kind(info.key):
                found.append(_source(store, info))
        if not found:
            matched = f"matched only {_tally(names)}" if names else f"matched nothing; {self._neighbours(store, fixed)}"
            raise InputError(f"{pattern}: {matched}")
        return found

    def _missing_message(self, origin: str, missing: list[str], total: int) -> str:
        if total == 1:
            store, key = self._split(missing[0])
            return f"{missing[0]} does not exist; {self._neighbours(store, key)}"
        named = ", ".join(missing[:NAMED_IN_ERRORS]) + (", …" if len(missing) > NAMED_IN_ERRORS else "")
        return f"{origin}: {len(missing)} of {total} do not exist: {named}"

    def _neighbours(self, store: Store, key: str) -> str:
        """What is in the folder of `key`, or in the nearest one above that is there."""
        folder = key.rpartition("/")[0]
        while True:
            prefix = f"{folder}/" if folder else ""
            names = Counter(_suffix(info.key) for info in islice(store.list(prefix, recursive=False), 1000))
            where = store.uri(folder) if folder else store.root
            if names or not folder or (store.root == "/" and os.path.isdir(f"/{folder}")):
                return f"{where} holds {_tally(names)}" if names else f"{where} holds no files"
            folder = folder.rpartition("/")[0]

    def _split(self, text: str, *, wild: bool = False) -> tuple[Store, str]:
        """Store and key of an absolute or relative path or an `s3://` URI; a bucket must answer at once.

        `wild`: the text is a pattern, and the current folder in front of it is none.
        """
        if "://" in text and not text.startswith("file://"):
            scheme, _, rest = text.partition("://")
            bucket, _, key = rest.partition("/")
            root = f"{scheme}://{bucket}"
        else:
            path = local_path(text)
            slash = "/" if path.endswith("/") else ""
            here = glob.escape(os.getcwd()) if wild else os.getcwd()
            root, key = "/", (os.path.normpath(os.path.join(here, path)) + slash).lstrip("/")
        if root not in self._stores:
            self._stores[root] = open_store(root, self._config)
            self._stores[root].preflight()
        return self._stores[root], key


def _stat(store: Store, key: str) -> ObjectInfo | None:
    try:
        return store.stat(key)
    except NotFound:
        return None
    except ValueError as error:
        raise InputError(f"{store.root}: {error}; rename the file") from None


def _source(store: Store, info: ObjectInfo) -> SourceObject:
    try:
        return SourceObject(store.uri(info.key), info.size, info.etag)
    except ValueError as error:
        raise InputError(f"{store.root}: {error}; rename the file") from None


def _tar(source: SourceObject) -> Shard:
    return Shard("tar", "/".join(source.uri.split("/")[-2:]), (source,))


def _shared_folder(group: list[SourceObject]) -> str:
    folders = [os.path.dirname(source.uri) for source in group]
    if len({"://" in folder for folder in folders}) > 1:  # local ones and a bucket's
        return "files"
    return os.path.commonpath(folders).rpartition("/")[2] or "files"


def _expand_braces(text: str) -> list[str]:
    """`a{0..2}.tar` -> three names; nested and several braces multiply."""
    spans = [abs(int(last) - int(first)) for first, last in re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", text)]
    too_many = max(spans, default=0) > MOST_EXPANSIONS  # braceexpand builds a span in memory before its first name
    try:
        names = [] if too_many else list(islice(braceexpand(text), MOST_EXPANSIONS + 1))
    except ValueError:  # a lone brace is part of a name
        return [text]
    if too_many or len(names) > MOST_EXPANSIONS:
        raise InputError(f"{text}: more than {MOST_EXPANSIONS} names; use a folder, a glob or a list file")
    return names


def _base(folder: str, texts: list[str]) -> str:
    """What relative lines of a list are relative to: its folder, or the current one if the first of them is not there."""
    first = next((text for text in texts if _relative(text) and not text.startswith("@")), None)
    if first is None or "://" in folder:
        return folder
    name = WILDCARD.split(_expand_braces(first)[0])[0]
    return (
        folder
        if os.path.exists(os.path.join(folder, name.rpartition("/")[0] if WILDCARD.search(first) else name))
        else ""
    )


def _relative(text: str) -> bool:
    return "://" not in text and not text.startswith(("/", "~"))


def _joined(base: str, text: str) -> str:
    if not base or not _relative(text):
        return text
    return f"{(glob.escape(base) if WILDCARD.search(text) else base).rstrip('/')}/{text}"


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in relative.split("/"))


def _suffix(key: str) -> str:
    return os.path.splitext(key)[1].lower() or "(no extension)"


def _tally(names: Counter[str]) -> str:
    ordered = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {suffix}" for suffix, n in ordered[:NAMED_IN_ERRORS])


def _pattern_regex(pattern: str) -> str:
    """Regular expression of a glob over whole keys."""
    parts = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\]|.", pattern, flags=re.S):
        simple = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}.get(token)
        if simple is not None:
            parts.append(simple)
        elif len(token) > 2 and token.startswith("["):
            negated = token[1] in "!^"
            body = token[2 if negated else 1 : -1].replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
            parts.append(f"[{'^/' if negated else ''}{body}]")
        else:
            parts.append(re.escape(token))
    return "".join(parts)
