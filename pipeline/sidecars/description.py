"""Set object of a sidecar set, `_sidecars/{name}.json`: what its tensors are and what made them. Created once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, InputError, NotFound, OutputError
from pipeline.format.layout import SIDECARS
from pipeline.records import LATENT_DTYPES, stable_hash
from pipeline.sidecars.names import BY_CAPTION, BY_ID, check_set_name, set_key, set_of_key

if TYPE_CHECKING:
    from pipeline.storage import Store

FORMAT = "latentset-sidecars"
FORMAT_VERSION = 1
DTYPES = {**LATENT_DTYPES, "int64": "<i8", "int32": "<i4", "uint8": "u1", "bool": "u1"}
"""Types of tensors, and numpy's type of the same size; bfloat16 is held as its bits."""
FLOATS = frozenset(LATENT_DTYPES)


@dataclass(frozen=True, slots=True)
class TensorKind:
    """Type and shape of one tensor of a set. A size of None differs between rows, such as the number of tokens."""

    dtype: str
    shape: tuple[int | None, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape may be in the set."""
        return len(shape) == len(self.shape) and all(
            wanted in (None, size) for wanted, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('…' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True, slots=True)
class SidecarSet:
    """Contents of a set object. `key`: what rows are found by, `caption_hash` or `id`. `parts`: everything that can change a tensor."""

    name: str
    key: str
    tensors: dict[str, TensorKind]
    parts: dict[str, Any]
    created: str = field(default="", compare=False)  # UTC, ISO 8601

    @property
    def fingerprint(self) -> str:
        """Hash of `parts`."""
        return stable_hash(self.parts)

    def to_json(self) -> bytes:
        """Canonical JSON bytes."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        return json.dumps(values, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> SidecarSet:
        """Inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: not the object of a set, or one of another format version.
        """
        raw: Any = json.loads(data)
        if raw["format"] != FORMAT or raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {raw['format']!r} {raw['format_version']!r}, expected {FORMAT} {FORMAT_VERSION}")
        if raw["key"] not in (BY_CAPTION, BY_ID):
            raise ValueError(f"its rows are found by {raw['key']!r}, expected {BY_CAPTION} or {BY_ID}")
        tensors = {name: TensorKind(one["dtype"], tuple(one["shape"])) for name, one in raw["tensors"].items()}
        if unknown := [one.dtype for one in tensors.values() if one.dtype not in DTYPES] or not tensors:
            raise ValueError(f"tensors of type {unknown}; expected at least one, of {', '.join(DTYPES)}")
        return cls(raw["name"], raw["key"], tensors, raw["parts"], raw["created"])


def set_names(store: Store) -> list[str]:
    """Names of all sidecar sets of an output, sorted."""
    found = (set_of_key(info.key) for info in store.list(SIDECARS, recursive=False))
    return sorted(name for name in found if name is not None)


def find_set(store: Store, name: str) -> SidecarSet | None:
    """The set of this name; None if there is none.

    Raises:
        OutputError: a set object that cannot be read.
    """
    key = set_key(check_set_name(name))
    try:
        data = store.read(key)
    except NotFound:
        return None
    try:
        return SidecarSet.from_json(data)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{key} cannot be read as a sidecar set: {error}; restore it, or use the Lathe that made it",
            uri=store.uri(key),
        ) from None


def read_set(store: Store, name: str) -> SidecarSet:
    """The set of this name.

    Raises:
        InputError: there is none; the message has those that there are.
        OutputError: a set object that cannot be read.
    """
    if (found := find_set(store, name)) is None:
        names = ", ".join(set_names(store)) or "none; see `lathe embed` and `lathe sidecar import`"
        raise InputError(f"{store.root} has no sidecar set {name!r}; there are {names}")
    return found


def create_set(store: Store, wanted: SidecarSet) -> SidecarSet:
    """The set in the output, created if it is not there. Raises as `check_set`."""
    if (found := check_set(store, wanted)) is not None:
        return found
    now = datetime.now(UTC).isoformat(timespec="seconds")
    made = SidecarSet(wanted.name, wanted.key, wanted.tensors, wanted.parts, now)
    store.put_if_absent(set_key(wanted.name), made.to_json())
    check_set(store, wanted)  # ours, or that of another run
    return read_set(store, wanted.name)


def check_set(store: Store, wanted: SidecarSet) -> SidecarSet | None:
    """The set in the output, None if it is not there.

    Raises:
        ConfigError: a set of this name was made differently; the message names the difference.
        OutputError: a set object that cannot be read.
    """
    found = find_set(store, wanted.name)
    if found is not None and found != wanted:
        raise ConfigError(
            f"sidecar set {wanted.name} of {store.root} was made differently: {_difference(found, wanted)}; use the same settings, or "
            "another --name"
        )
    return found


def _difference(found: SidecarSet, wanted: SidecarSet) -> str:
    pairs: list[tuple[str, Any, Any]] = [("rows by", found.key, wanted.key)]
    shapes = [{name: str(kind) for name, kind in one.tensors.items()} for one in (found, wanted)]
    pairs.append(("tensors", shapes[0], shapes[1]))
    for name in sorted({*found.parts, *wanted.parts}):
        pairs.append((name, found.parts.get(name), wanted.parts.get(name)))
    return "; ".join(f"{name} {_short(one)}, now {_short(two)}" for name, one, two in pairs if one != two)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"
