"""State of a loader: the next step, and what the order of steps depends on. The same on all ranks and for any number of them."""

from __future__ import annotations

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


def step_of(state: dict[str, Any], order: dict[str, Any]) -> int:
    """The step at which the state goes on.

    Weights may differ from that step on.

    Raises:
        ConfigError: not a state, or one of another order; names the first difference.
    """
    valid = isinstance(state, dict) and state.get("version") == VERSION and "step" in state
    if not valid or not isinstance(state.get("order"), dict):
        raise ConfigError(
            f"state: expected one of version {VERSION} that a loader's state_dict() gave, got {_short(state)}"
        )
    step, theirs = integer("state: step", state["step"], 0), state["order"]
    for name, ours in order.items():
        was = theirs.get(name, ADDED.get(name))
        if name == "weights":
            was, ours = _before(was, step), _before(ours, step)
        if was != ours:
            raise ConfigError(
                f"state: {name} was {_short(was)}, this loader has {_short(ours)}, so that its order of batches is another one; "
                f"open it with the same {name}, or start at step 0"
            )
    return step


def _before(weights: Any, step: int) -> Any:
    return [item for item in weights if item[0] < max(step, 1)] if isinstance(weights, list) else weights


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}…"
