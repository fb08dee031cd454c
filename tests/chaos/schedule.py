"""Schedule of kills and storage faults. Takes a seed, returns `Step`s and `Fault`s; the same seed gives the same ones on any machine.

Its clock is the number of requests that a command has sent to the object store, not the time: a slow machine changes nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from tests.faulty_proxy import Fault

Command = Literal["encode", "publish", "takedown", "compact", "gc"]
Victim = Literal["driver", "decoder", "encoder", "decoder_actor", "raylet", "node"]

# Requests of an undisturbed command over the corpus of `upload_corpus`, rounded up: a kill comes at one of these.
REQUESTS: dict[Command, int] = {"encode": 75, "publish": 65, "takedown": 70, "compact": 100, "gc": 130}
SHARES = (("reset", 0.02), ("throttled", 0.03), ("truncated", 0.03), ("lost_answer", 0.03))  # of all requests
FAULTS = {
    "reset": Fault("cut", after_bytes=0),
    "throttled": Fault("status", code=503),
    "truncated": Fault("cut", after_bytes=40),
    "lost_answer": Fault("lose"),
}


@dataclass(frozen=True)
class Step:
    """One start of a command. `victims`: what is killed, each with the number of the request, from 1, that it is killed at."""

    command: Command
    victims: tuple[tuple[Victim, int], ...] = ()


def steps(seed: int, kills: int, encode: tuple[Victim, ...] = ("driver", "driver", "decoder")) -> list[Step]:
    """Steps on one output: each command is started again until it has not been killed; then a build and a publication without work.

    `kills`: most killed starts of one command.

    `encode`: what is killed in a build; a victim that is named twice is twice as likely.
    """
    rng = random.Random(f"steps {seed}")
    found = []
    for command, most in REQUESTS.items():
        for _ in range(rng.randint(1, kills)):
            victim: Victim = rng.choice(encode) if command == "encode" else "driver"
            # A command that goes on after a kill sends fewer requests, so small numbers are more likely.
            at = rng.randint(1, rng.choice((most, most // 3)))
            found.append(Step(command, ((victim, at),)))
        found.append(Step(command))
    return [*found, Step("encode"), Step("publish")]


def fault(seed: int, step: int, request: int) -> str | None:
    """Name in `FAULTS` of what happens to one request of a step; None: nothing."""
    drawn = random.Random(f"fault {seed} {step} {request}").random()
    for name, share in SHARES:
        drawn -= share
        if drawn < 0:
            return name
    return None
