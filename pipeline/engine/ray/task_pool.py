"""Pool of Ray actors that each make one worker and run tasks on it, one at a time: tasks in, results out in any order.

For work whose results are committed by the worker, so that a task may run again. An actor that dies is replaced, and its task runs on
another; a task that fails or loses its actor `TRIES` times ends the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.errors import BuildError, LatheError, TransientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

TRIES = 4
WAIT_S = 1.0  # between looks for signals


class TaskActor:
    """Actor with one worker, made at the first task."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._worker: Any = None

    def run(self, task: Any) -> Any:
        """The worker's answer to a task."""
        if self._worker is None:
            self._worker = self._make()
        return self._worker.run(task)


class TaskPool:
    """Actors on the connected Ray. `make`: picklable; gives an object with `run(task)`. `gpus`: of each actor, 0 or 1."""

    def __init__(self, make: Callable[[], Any], *, actors: int, cpus: float, gpus: int) -> None:
        kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(TaskActor)
        made = ray.put(make)
        self._create: Callable[[], Any] = lambda: kind.remote(made)
        self._idle: list[Any] = [self._create() for _ in range(actors)]
        self._running: dict[Any, tuple[Any, Any, int]] = {}  # by reference: actor, task, tries before

    def results(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Results of all tasks. Tasks are taken when an actor is free.

        Raises:
            LatheError: what a worker raised, after `TRIES` if another try may succeed.
            BuildError: a task lost its actor `TRIES` times.
        """
        again: list[tuple[Any, int]] = []
        source = iter(tasks)
        ended = False
        while True:
            while self._idle and (again or not ended):
                task, tries = again.pop() if again else (next(source, None), 0)
                if task is None:
                    ended = True
                    break
                actor = self._idle.pop()
                self._running[actor.run.remote(task)] = actor, task, tries
            if not self._running:
                return
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=WAIT_S)
            for reference in done:
                actor, task, tries = self._running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayTaskError as error:
                    self._idle.append(actor)
                    _check_again(error.cause, tries)
                    again.append((task, tries + 1))
                except RayActorError as error:
                    self._idle.append(self._create())
                    _check_again(error, tries)
                    again.append((task, tries + 1))
                else:
                    self._idle.append(actor)
                    yield result

    def close(self) -> None:
        """Ends the actors."""
        for actor in [*self._idle, *(actor for actor, _, _ in self._running.values())]:
            ray.kill(actor)
        self._idle, self._running = [], {}


def _check_again(error: BaseException, tries: int) -> None:
    """Raises unless another try may succeed."""
    if isinstance(error, RayActorError) and tries + 1 >= TRIES:
        raise BuildError(
            f"a task lost its process {TRIES} times: {' '.join(str(error).split())[:300]}", stage="ray"
        ) from None
    if isinstance(error, RayActorError) or (isinstance(error, TransientError) and tries + 1 < TRIES):
        return
    if isinstance(error, LatheError):
        raise error
    raise BuildError(
        f"a worker failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", stage="ray"
    ) from error
