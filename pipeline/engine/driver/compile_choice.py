"""Whether a build compiles its network (`engine.compile`): what the output recorded, what the job asks for, or an estimate.

A compiled network gives other bits, so the choice is part of the fingerprint, and an output must not mix both. The first build records its
choice there before it encodes, `_compile/{fingerprint}.json`, created only if absent, and later builds follow it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.encoder.compiling import missing_compiler, why_never_compiled
from pipeline.engine.driver.compile_estimate import CompileChoice, estimate
from pipeline.errors import ConfigError, NotFound, OutputError
from pipeline.format.layout import compile_key

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.records import Shard
    from pipeline.storage import Store

_UNDECIDED = (
    "; compiling pays for these inputs, so that engine.compile=auto needs a compiler that works, and has recorded nothing yet: mend it and "
    "run the same command again, or set engine.compile=off"
)


def choose_compile(
    plain: BuildContext,
    store: Store,
    fingerprints: Collection[str],
    shards: Sequence[Shard],
    cores: Callable[[], float],
    *,
    encodes_here: bool = True,
) -> CompileChoice:
    """The choice of a build, which is recorded in the output if that has none.

    Args:
        plain: context of the build without compiling.
        store: the output.
        fingerprints: of its receipts.
        shards: the inputs as listed.
        cores: gives the CPU cores of all encoders together; called only if the estimate needs them.
        encodes_here: whether encoders run on this machine. Those of a cluster look for a compiler themselves (`prepare_compiler`).

    Raises:
        ConfigError: the job asks for what the output, the network or this machine does not allow; with `auto` also where compiling pays and
            the compiler that was found does not work. Nothing is recorded then.
    """
    asked, network = plain.job.engine.compile, plain.spec["network"]
    if (never := why_never_compiled(network)) is not None:
        if asked == "on":
            raise ConfigError(f"engine.compile: got on, and {never}; use auto or off")
        return CompileChoice(False, never)
    recorded = _recorded(plain, store, fingerprints)
    if recorded is None:
        choice = CompileChoice(asked == "on", f"engine.compile={asked}")
        if asked == "auto":
            choice = _estimated(plain, store, shards, cores)
            if choice.on:  # a trial that fails records nothing: the reason may pass, a record stays
                _need_compiler(plain.device, _UNDECIDED)
        elif choice.on and encodes_here:
            _need_compiler(plain.device, "")
        if _record(plain, store, choice):
            return choice
        recorded = not choice.on  # another build was first
    was = "on" if recorded else "off"
    encoded = not {plain.fingerprint, plain.as_compiled().fingerprint}.isdisjoint(fingerprints)
    if encoded:
        made, anew = f"the latents of {store.root} with otherwise equal settings are made with {was}", ""
    else:  # the record stays: another build, which has no receipt yet, may follow it
        made = f"{store.root} was begun with {was}, and has no latents of these settings yet"
        anew = f", or delete {store.uri(compile_key(plain.fingerprint))} if no other build is running"
    if asked != "auto" and (asked == "on") != recorded:
        raise ConfigError(
            f"engine.compile: {asked} was asked for, and {made}; the two differ in bits. Leave engine.compile at auto to go on, or choose "
            f"another output{anew}"
        )
    if recorded and encodes_here:
        _need_compiler(plain.device, f"{anew}; {made}")
    reason = "as the latents of this output" if encoded else "as this output was begun"
    if not recorded and asked == "auto" and (new := _estimated(plain, store, shards, cores)).on:
        reason += f"; another output would be compiled, {new.reason}"
    return CompileChoice(recorded, reason)


def _estimated(plain: BuildContext, store: Store, shards: Sequence[Shard], cores: Callable[[], float]) -> CompileChoice:
    """The choice for a new output."""
    if not store.conditional_writes():
        return CompileChoice(False, "the store has no conditional writes, so that builds at once could not agree")
    return estimate(plain.spec, plain.rules, shards, plain.device, plain.compute_dtype, cores)


def _need_compiler(device: str, more: str) -> None:
    if (missing := missing_compiler(device)) is not None:
        raise ConfigError(f"engine.compile: {missing}{more}")


# --- record -----------------------------------------------------------------------------------------------------------


def _record(plain: BuildContext, store: Store, choice: CompileChoice) -> bool:
    """Records the choice unless the output has one. Returns whether it is the one that counts."""
    key = compile_key(plain.fingerprint)
    made = {
        "format": "latentset-compile",
        "compile": choice.on,
        "reason": choice.reason,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.put_if_absent(key, json.dumps(made, indent=1).encode())
    return _read(store, key) is choice.on  # read back: some stores do not decide a race


def _recorded(plain: BuildContext, store: Store, fingerprints: Collection[str]) -> bool | None:
    """The output's choice. Latents tell as well: those of older versions of Lathe, and of an output whose record was lost."""
    found = _read(store, compile_key(plain.fingerprint))
    if found is None and plain.fingerprint in fingerprints:
        return False
    if found is None and plain.as_compiled().fingerprint in fingerprints:
        return True
    return found


def _read(store: Store, key: str) -> bool | None:
    try:
        data = store.read(key)
    except NotFound:
        return None
    try:
        found = json.loads(data)["compile"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, bool):
        raise OutputError(
            f"{key} is not a record of engine.compile: expected JSON with compile true or false, got {data[:80]!r}; delete it, receipts "
            "tell as well",
            uri=store.uri(key),
        )
    return found
