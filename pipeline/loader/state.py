"""State of a loader: the next step, and what the order of steps depends on. The same on all ranks and for any number of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.loader.arguments import integer
from pipeline.loader.rules import PerBucket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.loader.mixture import Weights
    from pipeline.loader.rules import BatchRule

VERSION = 1
ADDED: dict[str, Any] = {"variants": "all", "sidecars": []}
"""Parts of an order that older states do not name, with what held then."""
SHOWN, BEFORE = 300, 100  # characters of a value in a message, and how many of them before the first difference
# `LatentDataset.identity` in parts, with their names in messages
IDENTITY = re.compile(
    r"(?P<output>.*?)(?:@(?P<snapshot>\d+)|:receipts):(?P<fingerprint>[^:]*):(?P<list_of_files>[0-9a-f]{16}|empty)"
    r"(?::(?!with )(?P<where>.*?):(?P<rows_kept>[0-9a-f]{16}))?(?::with (?P<sidecars>.*))?",
    re.DOTALL,
)


def described_rule(rule: BatchRule) -> str:
    """A batch rule as text: equal rules, equal text."""
    if isinstance(rule, PerBucket):
        return repr([(name, share.size, share.keep) for name, share in sorted(rule.shares.items())])
    return repr(rule)


def described_weights(weights: Sequence[Weights]) -> list[list[Any]]:
    """Weights with the steps from which they hold, as JSON has them."""
    return [[item.from_step, list(map(float, item.values))] for item in sorted(weights)]


def make_state(step: int, order: dict[str, Any]) -> dict[str, Any]:
    """State before `step`. `order`: what the order depends on, by name, JSON-ready."""
    return {"version": VERSION, "step": step, "order": order}


def step_of(state: dict[str, Any], order: dict[str, Any], roots: Sequence[str]) -> int:
    """The step at which the state goes on. `roots`: where the outputs of the datasets are.

    Weights may differ from that step on, and epochs of one dataset altogether: they only say where the order ends. The epochs of a dataset
    that is mixed decide when it leaves the mixture.

    Raises:
        ConfigError: not a state, or one of another order; names the first difference.
    """
    valid = isinstance(state, dict) and state.get("version") == VERSION and "step" in state
    if not valid or not isinstance(state.get("order"), dict):
        raise ConfigError(
            f"state: expected one of version {VERSION} that a loader's state_dict() gave, got {_short(state)}"
        )
    step, theirs = integer("state: step", state["step"], 0), state["order"]
    # Sidecars first: with missing_sidecars="drop" they decide which rows a dataset has.
    mixed = len(order["datasets"]) > 1 or order["image_ratio"] is not None
    for name, ours in sorted(order.items(), key=lambda item: item[0] != "sidecars"):
        if name == "epochs" and not mixed:
            continue
        was = theirs.get(name, ADDED.get(name))
        if name == "weights":
            was, ours = _before(was, step), _before(ours, step)
        if was != ours:
            what, was, ours = difference(name, was, ours)
            moved = re.fullmatch(r"snapshot of datasets\[(\d+)\]", what)
            number = was.strip("'")  # of the snapshot
            same = f"{roots[int(moved[1])]}@{number}" if moved and number.isdigit() else f"it with the same {name}"
            raise ConfigError(
                f"state: {what} was {was}, this loader has {ours}, so that its order of batches is another one; open {same}, "
                "or start at step 0"
            )
    return step


def difference(name: str, one: Any, other: Any) -> tuple[str, str, str]:
    """Name of the part in which two orders differ, and its value in each, as text cut around the first difference.

    `name`, `one`, `other`: a part of the order and its two values.
    """
    if name in ("datasets", "sidecars") and isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"number of {name}", str(len(one)), str(len(other))
        place = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        name, one, other = f"{name}[{place}]", one[place], other[place]
        first, second = IDENTITY.fullmatch(str(one)), IDENTITY.fullmatch(str(other))
        if first and second:
            part = next(part for part in first.groupdict() if first[part] != second[part])
            name, one, other = f"{part.replace('_', ' ')} of {name}", first[part], second[part]
            if part == "snapshot":
                one, other = one or "receipts", other or "receipts"
    texts = [repr(one), repr(other)]
    at = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
    start = max(0, at - BEFORE) if max(map(len, texts)) > SHOWN else 0
    shown = ["…" * (start > 0) + text[start:][:SHOWN] + "…" * (len(text) > start + SHOWN) for text in texts]
    return name, shown[0], shown[1]


def _before(weights: Any, step: int) -> Any:
    return [item for item in weights if item[0] < max(step, 1)] if isinstance(weights, list) else weights


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
