"""Encode table: planes in host memory -> staging -> causal state -> latents in host memory, for each clip, batch, dtype and form.

A row has frames/s with two batches in flight, shares of the machine's own rates, peak memory on the device, kernel launches. Cases run in
an order that tells most if the run is cut off: what lies nearest to bfloat16, 17x256x256, 64 clips comes first, all forms of it in turn.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_day import forms
from benchmarks.gpu_day.machine_facts import copy_rates
from benchmarks.gpu_day.profiles import by_kernel, launches
from model.definition import definition
from model.kernels.graphs import EAGER_RUNS
from model.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from benchmarks.gpu_day.report import Report
    from benchmarks.gpu_day.settings import Clip, Settings
    from benchmarks.machine import Machine

LARGEST_PLANES = 4 << 30  # bytes of a batch: copying more into pinned memory takes seconds for each run
OTHERS_BATCH = 8  # clips a step of the networks that are not the table's
FURTHER_ROWS = 6  # of the table before other networks are compiled
SECTION = "encode"


@dataclass(frozen=True)
class Case:
    """One row to be measured."""

    network: str
    clip: Clip
    batch: int
    dtype: str
    form: str

    @property
    def name(self) -> str:
        """Name of its entry in the report."""
        return f"{self.network} {'x'.join(map(str, self.clip))} batch {self.batch} {self.dtype} {self.form}"

    @property
    def compiles(self) -> bool:
        """Whether this form compiles each new shape."""
        return self.form.startswith("compiled")


def cases(settings: Settings) -> list[Case]:
    """All rows, the most informative first. Compiling a new shape takes most of a minute: less informative rows are compiled late.

    One shape of the table's network in all forms; the other networks; two more shapes; the other networks compiled; all other shapes,
    compiled forms last.
    """
    ranked = []
    for c, clip in enumerate(settings.clips):
        for b, batch in enumerate(settings.batches):
            for d, dtype in enumerate(settings.dtypes):
                if 3 * math.prod(clip) * batch <= LARGEST_PLANES:
                    ranked.append((c + b + d, d, c, b, clip, batch, dtype))
    table = [
        Case(settings.network, clip, batch, dtype, form)
        for *_, clip, batch, dtype in sorted(ranked)
        for form in forms.FORMS
    ]
    others = [
        Case(network, settings.clips[0], min(OTHERS_BATCH, settings.batches[0]), settings.dtypes[0], form)
        for form in ("kernels", "plain", "compiled steps")
        for network in settings.checked
        if network != settings.network
    ]
    first, table = table[: len(forms.FORMS)], table[len(forms.FORMS) :]
    quick, slow = ([case for case in table if case.compiles == compiles] for compiles in (False, True))
    other_quick, other_slow = ([case for case in others if case.compiles == compiles] for compiles in (False, True))
    return [*first, *other_quick, *quick[:FURTHER_ROWS], *other_slow, *quick[FURTHER_ROWS:], *slow]


def run(report: Report, settings: Settings, machine: Machine) -> None:
    """Section `encode`."""
    table, listed = Table(settings, machine), {case.name: case for case in cases(settings)}
    names = report.missing(listed)
    for position, name in enumerate(names):
        if time.monotonic() > report.until:
            left = names[position:]
            report.leave_out(f"{len(left)} cases", f"the section's time is spent: {'; '.join(left)}")
            return
        report.measure(name, lambda case=listed[name]: table.row(case))


def profile_best(report: Report, settings: Settings, machine: Machine) -> None:
    """Section `profile`: time by kernel of the fastest row of the table's network in a form of builds, and of its plain twin."""
    rows = [row for row in report.values(SECTION).values() if row["network"] == settings.network]
    rows = [row for row in rows if "frames_per_s" in row and row["form"] in forms.OF_BUILDS]
    if not rows:
        report.leave_out("profile", "the encode table has no row of the network in a form of builds")
        return
    best = max(rows, key=lambda row: row["frames_per_s"])
    for form in (best["form"], "plain"):
        case = Case(best["network"], tuple(best["clip"]), best["batch"], best["dtype"], form)
        report.measure(case.name, lambda case=case: Table(settings, machine).by_kernel(case))


class Table:
    """Measures rows. Networks stay, so that what was compiled is compiled once; graphs of a row do not."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        self.settings, self.machine = settings, machine
        self._copies: dict[str, float] = {}
        self._made: dict[tuple[str, str, str], Any] = {}

    def row(self, case: Case) -> dict[str, Any]:
        """Values of one row, JSON-ready. Out of memory is a result like any other."""
        found: dict[str, Any] = {
            "network": case.network,
            "clip": case.clip,
            "batch": case.batch,
            "dtype": case.dtype,
            "form": case.form,
        }
        try:
            return found | self._measured(case)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block, so that the traceback no longer holds tensors.
        self._form(case).end_case()
        if self.machine.cuda:
            torch.cuda.empty_cache()
        return found | {"out_of_memory": True}

    def by_kernel(self, case: Case) -> dict[str, Any]:
        """Time by kernel of one warm batch."""
        form, clips = self._form(case), forms.random_clips(case.clip, case.batch)
        for _ in range(EAGER_RUNS + 2):
            form.launch(clips)()
        return {"kernels": by_kernel(self.machine, lambda: form.launch(clips)())}

    def _measured(self, case: Case) -> dict[str, Any]:
        form, clips, machine = self._form(case), forms.random_clips(case.clip, case.batch), self.machine
        first_s = machine.clock(lambda: form.launch(clips)())  # compiles; a network with kernels packs its weights
        for _ in range(EAGER_RUNS + 1):  # until steps are replayed
            once_s = machine.clock(lambda: form.launch(clips)())
        peak_mb = machine.peak_mb(lambda: form.launch(clips)())
        step_s = self._steady_seconds(form, clips, once_s)
        frames = case.batch * case.clip[0]
        flop, moved = work(case.network, self.settings.config(case.network), case.clip, case.dtype)
        copies = self._copy_rates()
        found = {
            "frames_per_s": frames / step_s,
            "step_ms": 1e3 * step_s,
            "first_call_s": first_s,
            "peak_mb": peak_mb,
            "launches": launches(machine, lambda: form.launch(clips)()),
            "of_matrix_rate": case.batch * flop / step_s / machine.matrix_rate(getattr(torch, case.dtype)),
            # above 1: this form no longer moves all that the plain definition reads and writes
            "definition_bytes_of_copy_rate": case.batch * moved / step_s / copies["device_bytes_per_s"],
            "planes_of_copy_rate": case.batch * clips[0].nbytes / step_s / copies["to_device_bytes_per_s"],
            **form.facts(),
        }
        form.end_case()
        return found

    def _steady_seconds(self, form: Any, clips: Any, once_s: float) -> float:
        """Seconds a batch while the next one is launched before the results of the last are asked for, as in a build."""
        repeats = min(max(2, int(self.settings.seconds / max(once_s, 1e-6))), 50)

        def batches() -> None:
            pending = form.launch(clips)
            for _ in range(repeats - 1):
                following = form.launch(clips)
                pending()
                pending = following
            pending()

        return self.machine.clock(batches) / repeats

    def _form(self, case: Case) -> Any:
        key = (case.network, case.form, case.dtype)
        if key not in self._made:
            self._made[key] = forms.make(case.network, case.form, case.dtype, self.settings, self.machine)
        return self._made[key]

    def _copy_rates(self) -> dict[str, float]:
        self._copies = self._copies or copy_rates(self.machine)
        return self._copies


class MovedBytes(TorchDispatchMode):
    """Counts the bytes that operators read and write, each by itself; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and adds its inputs and outputs."""
        result = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        if not any(value.alias_info is not None and not value.alias_info.is_write for value in returns):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.total += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


_WORK: dict[tuple[Any, ...], tuple[float, float]] = {}


def work(network: str, config: dict[str, Any] | None, clip: Clip, dtype: str) -> tuple[float, float]:
    """FLOP of encoding one clip, and the bytes that the eager definition reads and writes; counted without computing."""
    key = (network, clip, dtype)
    if key not in _WORK:
        full, weights = forms.weights_of(network, config)
        moved = MovedBytes()
        with torch.device("meta"), torch.inference_mode(mode=False), torch.no_grad():
            plain: Any = definition(network, full, {name: tensor.to("meta") for name, tensor in weights.items()})
            plain = plain.to("meta", getattr(torch, dtype))
            video = torch.empty((1, 3, *clip), dtype=getattr(torch, dtype))
            with FlopCounterMode(display=False) as counter, moved:
                plain.encode(video)
        _WORK[key] = float(counter.get_total_flops()), float(moved.total)
    return _WORK[key]
