"""Cache of Swift's proxy in its own memory, instead of memcached. Without one, each request asks for its account and bucket again.

One proxy process serves the tests, so there is no other whose writes the cache could miss; the proxy clears entries that it changes.
"""

from __future__ import annotations

import json
import time as clock
from typing import Any


class MemoryCache:
    """The methods of `swift.common.memcached.MemcacheRing` that the proxy calls. Values pass through JSON, as there."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, str]] = {}

    def set(self, key: str, value: Any, serialize: bool = True, time: float = 0, **options: Any) -> None:
        """Keeps `value` for `time` seconds; 0: for ever."""
        self._entries[key] = clock.monotonic() + time if time else float("inf"), json.dumps(value)

    def get(self, key: str, **options: Any) -> Any:
        """The value, or None."""
        until, text = self._entries.get(key, (0.0, ""))
        return json.loads(text) if until > clock.monotonic() else None

    def incr(self, key: str, delta: int = 1, time: float = 0) -> int:
        """Adds to a number and returns it."""
        number = max(0, int(self.get(key) or 0) + delta)
        self.set(key, number, time=time)
        return number

    def decr(self, key: str, delta: int = 1, time: float = 0) -> int:
        """Subtracts from a number, not below 0, and returns it."""
        return self.incr(key, -delta, time)

    def delete(self, key: str, server_key: str | None = None) -> None:
        """Forgets the value."""
        self._entries.pop(key, None)

    def set_multi(
        self, mapping: dict[str, Any], server_key: str, serialize: bool = True, time: float = 0, **options: Any
    ) -> None:
        """`set` for each."""
        for key, value in mapping.items():
            self.set(key, value, time=time)

    def get_multi(self, keys: list[str], server_key: str, **options: Any) -> list[Any]:
        """`get` for each."""
        return [self.get(key) for key in keys]


def filter_factory(global_conf: dict[str, str], **local_conf: str) -> Any:
    """Factory of the middleware, named by the proxy's configuration."""
    cache = MemoryCache()

    def middleware(application: Any) -> Any:
        def call(environment: dict[str, Any], start_response: Any) -> Any:
            environment.setdefault("swift.cache", cache)
            return application(environment, start_response)

        return call

    return middleware
