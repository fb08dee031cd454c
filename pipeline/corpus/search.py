"""Search for inputs in their stores: names, folders, patterns and list files become `SourceObject`s, in order.

Other contents are counted in `PassedOver`. An input without a tar or video is an error that says what there is instead.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.corpus.kinds import LIST_SUFFIXES, is_hidden, media_kind, reason, suffix
from pipeline.corpus.listing import list_folder, source_of, tally, why_not
from pipeline.corpus.lists import LONGEST_NAME, base_folder, is_comment, is_relative, joined, list_lines
from pipeline.corpus.passed_over import PassedOver, shown
from pipeline.corpus.patterns import WILDCARD, expand_braces, pattern_regex
from pipeline.corpus.tables import TABLE_SUFFIXES, is_table
from pipeline.errors import InputError, NotFound
from pipeline.records import MISSING, SourceObject
from pipeline.storage import ObjectInfo, Store, Unlisted, local_path, open_store

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from pipeline.config import StorageConfig
    from pipeline.records import ImagePolicy

MOST_LISTS = 8  # list files within list files
LOOK_UP_ONE_BY_ONE = 8  # names in one folder; more of them are looked up by one listing
NAMED_IN_ERRORS = 5
EXPECTED = "expected .tar, .tar.gz, .mp4, .webm, …"


class Search:
    """Search for all inputs of one job. Keeps stores by root, so that each bucket is checked once."""

    def __init__(self, config: StorageConfig, passed_over: PassedOver, images: ImagePolicy = "skip") -> None:
        self._config = config
        self._images = images
        self._passed_over = passed_over
        self._stores: dict[str, Store] = {}
        self.left_out: set[str] = set()  # URIs, without suffix, of videos that `images` leaves out

    def input(self, text: str, depth: int = 0) -> list[SourceObject]:
        """All objects of one input. `depth`: number of list files around it.

        Raises:
            InputError: it matches nothing, a named object is missing, a list cannot be read or includes itself.
            AccessError: a bucket or folder cannot be listed.
        """
        if not text:
            raise InputError("an input is empty; expected a path, a pattern, @list.txt or s3://bucket/prefix")
        if text.startswith("@") or (text.lower().endswith(LIST_SUFFIXES) and not WILDCARD.search(text)):
            return self._list_file(text.removeprefix("@"), depth)
        return self._patterns(text, self._expand(text))

    def tables(self, text: str) -> list[SourceObject]:
        """The objects of a table: a file, a folder of its parts, or a pattern of them.

        Raises:
            InputError: there is none, or its suffix is not that of a table.
        """
        if not is_table(text):
            raise InputError(f"{shown(text)}: expected a table, one of {', '.join(TABLE_SUFFIXES)}")
        wild = WILDCARD.search(text) is not None and not self._exists(text)
        store, key = self._split(text, wild=wild)
        if not wild and key and (info := _stat(store, key)) is not None:
            return [source_of(store, info)]
        first = WILDCARD.search(key) if wild else None
        prefix = key[: first.start()] if first else f"{key.rstrip('/')}/"
        matcher = re.compile(pattern_regex(key) if first else re.escape(prefix) + "[^/]+", flags=re.S)
        infos = store.list(prefix, unlisted=_ignore)
        found = [info for info in infos if matcher.fullmatch(info.key) and is_table(info.key)]
        found = [info for info in found if not is_hidden(info.key[len(prefix) :])]
        if not found:
            raise InputError(f"table {shown(text)} does not exist; {self._folder_contents(store, prefix)}")
        return [source_of(store, info) for info in found]

    def uri_in(self, folder: str, text: str) -> str:
        """URI of a path or URI in a table of `folder`. `./` and `../` at its beginning are resolved, in a bucket too."""
        if folder and is_relative(text):
            folder = folder.rstrip("/")
            while text.startswith(("./", "../")):
                step, _, rest = text.partition("/")
                above = folder if step == "." else folder.rpartition("/")[0]
                if above.endswith("/"):  # above the bucket
                    break
                folder, text = above, rest.lstrip("/")
            text = f"{folder}/{text}"
        store, key = self._split(text)
        return store.uri(key)

    def rows(self, table: str, uris: Collection[str]) -> list[SourceObject]:
        """Objects that the rows of a table name; those that do not exist have the etag `MISSING`.

        Raises:
            InputError: no row names a tar or video.
        """
        places = {uri: self._split(uri) for uri in uris}
        known = self._look_up([place for uri, place in places.items() if media_kind(uri, self._images)])
        found = []
        others: Counter[str] = Counter()
        for uri, (store, key) in places.items():
            if media_kind(uri, self._images) is None:
                others[suffix(key)] += 1
                self._passed_over.add(uri, suffix(key), reason(suffix(key), self._images))
                if media_kind(uri) == "video":
                    self.left_out.add(os.path.splitext(uri)[0])
            elif (info := known.get((store.root, key))) is not None:
                found.append(source_of(store, info))
            else:
                found.append(SourceObject(uri, 0, MISSING))
        if not found:
            raise InputError(
                f"{shown(table)}: no row names a tar or video; they name {tally(others)}{why_not(others, self._images)}, such as "
                f"{shown(next(iter(uris), ''))}. table.source=COLUMN chooses the column that names them"
            )
        return found

    def existing(self, uris: Iterable[str]) -> dict[str, SourceObject]:
        """Those of the objects that are there, by URI."""
        places = {uri: self._split(uri) for uri in uris}
        known = self._look_up(list(places.values()))
        found = {uri: known.get((store.root, key)) for uri, (store, key) in places.items()}
        return {uri: source_of(places[uri][0], info) for uri, info in found.items() if info is not None}

    def _list_file(self, text: str, depth: int) -> list[SourceObject]:
        store, key = self._split(text)
        if depth == MOST_LISTS:
            raise InputError(
                f"@{shown(text)}: list files are nested more than {MOST_LISTS} deep; check whether a list includes itself"
            )
        try:
            lines = list_lines(store.read(key), text)
        except NotFound:
            raise InputError(f"list file {text} does not exist") from None
        base = base_folder(os.path.dirname(store.uri(key)), [line for line in lines if not is_comment(line)])
        names = self._names_among([line for line in lines if is_comment(line)], base)
        texts = [line for line in lines if not is_comment(line) or line in names]
        found: list[SourceObject] = []
        plain: list[str] = []  # looked up together: a list may have a hundred thousand lines
        for line in [*texts, None]:
            if line is not None and not line.startswith("@") and not line.lower().endswith(LIST_SUFFIXES):
                plain += self._expand(joined(base, line))
                continue
            found += self._lines(text, plain)
            plain = []
            if line is not None:
                found += self.input("@" + joined(base, line.removeprefix("@")), depth + 1)
        if not found:
            raise InputError(f"list file {text} is empty; expected one input per line")
        return found

    def _lines(self, name: str, patterns: list[str]) -> list[SourceObject]:
        """Objects of the lines of list `name`. Errors name the list, since a shell expands `*` also to text files that are not lists."""
        try:
            return self._patterns(f"@{name}", patterns)
        except InputError as error:
            if str(error).startswith(f"@{shown(name)}"):
                raise
            raise InputError(
                f"{shown(name)} was read as a list of inputs; its line {error}. Leave {shown(name)} out if it is not a list"
            ) from None

    def _names_among(self, comments: list[str], base: str) -> set[str]:
        """Lines that begin with `#` and name an existing file. In a bucket only those with a suffix of a tar or video are looked up."""
        if "://" not in base:
            return {line for line in comments if os.path.lexists(os.path.join(base, line))}
        places = {line: self._split(joined(base, line)) for line in comments if media_kind(line, self._images)}
        places = {
            line: place for line, place in places.items() if len(place[1].encode(errors="replace")) <= LONGEST_NAME
        }
        known = self._look_up(list(places.values()))
        return {line for line, (store, key) in places.items() if (store.root, key) in known}

    def _patterns(self, origin: str, patterns: list[str]) -> list[SourceObject]:
        """Objects of names, folders and patterns without braces, in order. `origin` is the input as written by the user."""
        literal = [not WILDCARD.search(pattern) or self._exists(pattern) for pattern in patterns]
        places = [self._split(pattern, wild=not plain) for pattern, plain in zip(patterns, literal, strict=True)]
        known = self._look_up([place for place, plain in zip(places, literal, strict=True) if plain])
        found: list[SourceObject] = []
        missing: list[str] = []
        for pattern, (store, key), plain in zip(patterns, places, literal, strict=True):
            if (info := known.get((store.root, key))) is not None:
                if _is_marker(store, info):
                    found += self._folder(store, key, pattern, marker=True)
                    continue
                if media_kind(key, self._images) is None:
                    raise InputError(
                        f"{shown(pattern)}: its suffix is not that of a tar or video{why_not([suffix(key)], self._images)}; {EXPECTED}"
                    )
                found.append(source_of(store, info))
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
        """Names of a brace pattern; a file whose name contains braces is found under that name."""
        return expand_braces(text) if "{" in text and not self._exists(text) else [text]

    def _exists(self, text: str) -> bool:
        """Whether an object has exactly this name, pattern characters included."""
        if "://" not in text:
            return os.path.exists(local_path(text))
        store, key = self._split(text)
        return bool(key) and not key.endswith("/") and _stat(store, key) is not None

    def _look_up(self, places: list[tuple[Store, str]]) -> dict[tuple[str, str], ObjectInfo]:
        """The names that exist: a few are looked up one by one, many of one folder by one listing of their common prefix."""
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
                infos = [
                    info for info in store.list(lowest[:shared], recursive=False, unlisted=_ignore) if info.key in keys
                ]
            else:
                infos = [info for key in keys if (info := _stat(store, key))]
            known.update({(root, info.key): info for info in infos})
        return known

    def _folder(self, store: Store, key: str, pattern: str, *, marker: bool = False) -> list[SourceObject]:
        """Everything below a folder or prefix; nothing if there is no such folder. `marker`: an empty object has exactly this name."""
        if media_kind(key, self._images) and not marker and not (store.root == "/" and os.path.isdir(f"/{key}")):
            return []  # a missing file: no listing for each, since there may be thousands
        prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
        found, others = list_folder(
            store, prefix, self._passed_over, below=prefix, images=self._images, left_out=self.left_out
        )
        if others and not found:
            raise InputError(
                f"{shown(pattern)}: no tar shards or videos in it; it holds {tally(others)}{why_not(others, self._images)}"
            )
        if not others and not found and store.root == "/" and os.path.isdir(f"/{key}"):
            raise InputError(f"{shown(pattern)}: the folder is empty; expected tar shards or videos")
        return found

    def _wildcards(self, store: Store, key: str, pattern: str) -> list[SourceObject]:
        """Objects that match, or lie in a folder that matches."""
        first = WILDCARD.search(key)
        fixed = key[: first.start()] if first else key
        folder = fixed.rpartition("/")[0]
        only_last = "/" not in key[len(fixed) :]
        matcher = re.compile(pattern_regex(key) + r"(?:/.*)?", flags=re.S)
        found, others = list_folder(
            store,
            fixed,
            self._passed_over,
            below=folder,
            recursive=not (only_last and media_kind(key, self._images)),
            matches=lambda name: matcher.fullmatch(name) is not None,
            images=self._images,
            left_out=self.left_out,
        )
        if not found:
            nothing = f"matched nothing; {self._folder_contents(store, fixed)}"
            matched = f"matched only {tally(others)}{why_not(others, self._images)}" if others else nothing
            raise InputError(f"{shown(pattern)}: {matched}")
        return found

    def _missing_message(self, origin: str, missing: list[str], total: int) -> str:
        entries = {pattern: self._described(pattern) for pattern in missing[:NAMED_IN_ERRORS]}
        if total == 1:
            store, key = self._split(missing[0])
            name, entry = shown(missing[0]), entries[missing[0]]
            return (
                f"{name} {entry}; {EXPECTED}"
                if entry
                else f"{name} does not exist; {self._folder_contents(store, key)}"
            )
        named = ", ".join(
            f"{shown(pattern)} ({entry})" if entry else shown(pattern) for pattern, entry in entries.items()
        )
        more = ", …" if len(missing) > NAMED_IN_ERRORS else ""
        return f"{shown(origin)}: {len(missing)} of {total} do not exist: {named}{more}"

    def _described(self, pattern: str) -> str:
        """Description of an entry that is neither file nor folder: `is a fifo, not a file`. Empty if there is no entry."""
        store, key = self._split(pattern)
        entry = store.described(key) if key else None
        if entry is None:
            return ""
        if entry.what == "file":
            return entry.why
        return f"is a {entry.what} that {entry.why}" if entry.what == "link" else f"is a {entry.what}, {entry.why}"

    def _folder_contents(self, store: Store, key: str) -> str:
        """Contents of the folder of `key`, or of the nearest existing one above, as text."""
        folder = key.rpartition("/")[0]
        while True:
            prefix = f"{folder}/" if folder else ""
            names = Counter(
                suffix(info.key) for info in islice(store.list(prefix, recursive=False, unlisted=_ignore), 1000)
            )
            where = store.uri(folder) if folder else store.root
            if names or not folder or (store.root == "/" and os.path.isdir(f"/{folder}")):
                return f"{where} holds {tally(names)}" if names else f"{where} holds no files"
            folder = folder.rpartition("/")[0]

    def _split(self, text: str, *, wild: bool = False) -> tuple[Store, str]:
        """Store and key of an absolute or relative path or an `s3://` URI. A new store must pass its `preflight`.

        `wild`: the text is a pattern. Pattern characters of the current folder, which is put before it, are escaped.
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
        raise InputError(f"{store.root}: {error}") from None


def _is_marker(store: Store, info: ObjectInfo) -> bool:
    """Whether this is an empty object with others below its name: those are the input."""
    return "://" in store.root and info.size == 0 and next(iter(store.list(f"{info.key}/")), None) is not None


def _ignore(entry: Unlisted) -> None:
    pass
