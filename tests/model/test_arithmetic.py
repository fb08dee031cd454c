"""Process-wide torch switches while threads call networks. The switches exist without a GPU, so all of this runs on a CPU."""

from __future__ import annotations

import threading

import pytest
import torch

from model.arithmetic import ProcessSwitches, own_arithmetic

LONG_S = 60.0  # for what must happen
SHORT_S = 0.2  # for what must not: a later event would be missed, never a false alarm
CONV, MATMUL = torch.backends.cudnn.conv, torch.backends.cuda.matmul


def now() -> tuple[str, str, bool]:
    return CONV.fp32_precision, MATMUL.fp32_precision, MATMUL.allow_fp16_accumulation


@pytest.fixture(autouse=True)
def programs_own():
    """Settings of the program: tf32 everywhere and 16-bit sums."""
    before = now()
    CONV.fp32_precision = MATMUL.fp32_precision = "tf32"
    MATMUL.allow_fp16_accumulation = True
    yield ("tf32", "tf32", True)
    CONV.fp32_precision, MATMUL.fp32_precision, MATMUL.allow_fp16_accumulation = before


class Call(threading.Thread):
    """Call in its own thread, open until released."""

    def __init__(self, switches: ProcessSwitches, products: str = "ieee", error: Exception | None = None) -> None:
        super().__init__(daemon=True)
        self.opened, self.end, self.closed = threading.Event(), threading.Event(), threading.Event()
        self._switches, self._products, self._error = switches, products, error
        self.seen: list[tuple[str, str, bool]] = []
        self.start()

    def run(self) -> None:
        try:
            with self._switches.held(self._products):
                self.seen.append(now())
                self.opened.set()
                assert self.end.wait(LONG_S)
                self.seen.append(now())
                if self._error is not None:
                    raise self._error
        except OSError:
            pass
        finally:
            self.closed.set()

    def finish(self) -> None:
        self.end.set()
        assert self.closed.wait(LONG_S)


def opened(call: Call) -> Call:
    assert call.opened.wait(LONG_S)
    return call


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_overlapping_calls_restore_the_programs_setting(programs_own, first_ends_first):
    switches = ProcessSwitches()
    calls = [opened(Call(switches)), opened(Call(switches))]
    for call in calls if first_ends_first else reversed(calls):
        assert now() == ("ieee", "ieee", False)
        call.finish()
    assert now() == programs_own
    assert [call.seen for call in calls] == [[("ieee", "ieee", False)] * 2] * 2


def test_every_network_call_runs_in_the_guarded_context(programs_own):
    cuda = torch.device("cuda")
    one, other = own_arithmetic(cuda), own_arithmetic(cuda)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)  # the first to begin is the first to end, as in two threads
    assert now() == ("ieee", "ieee", False)
    other.__exit__(None, None, None)
    torch.set_grad_enabled(True)  # gradients are a thread's own, and here both calls were one thread's
    assert now() == programs_own


def test_a_call_with_another_setting_waits_and_is_not_overtaken(programs_own):
    switches = ProcessSwitches()
    first = opened(Call(switches))
    other = Call(switches, "tf32")
    assert not other.opened.wait(SHORT_S)
    late = Call(switches)
    assert not late.opened.wait(SHORT_S)
    assert now() == ("ieee", "ieee", False)
    first.finish()
    opened(other)
    assert now() == ("tf32", "tf32", False)
    assert not late.opened.wait(SHORT_S)
    other.finish()
    opened(late).finish()
    assert late.seen == [("ieee", "ieee", False)] * 2
    assert now() == programs_own


def test_threads_with_different_settings_each_compute_with_their_own(programs_own):
    switches, wrong = ProcessSwitches(), []

    def work(products: str) -> None:
        for _ in range(200):
            with switches.held(products):
                if now() != (products, products, False):
                    wrong.append(now())

    threads = [threading.Thread(target=work, args=(("ieee", "tf32")[n % 2],)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert not wrong
    assert now() == programs_own


def test_a_failing_call_restores_the_setting(programs_own):
    switches = ProcessSwitches()
    opened(Call(switches, error=OSError("broken"))).finish()
    assert now() == programs_own
    with pytest.raises(ZeroDivisionError), switches.held("ieee"):
        raise ZeroDivisionError
    assert now() == programs_own
    with switches.held("tf32"):  # nothing is left open
        assert now() == ("tf32", "tf32", False)


def test_nested_calls_need_the_same_setting(programs_own):
    switches = ProcessSwitches()
    with switches.held("ieee"), switches.held("ieee"):
        with pytest.raises(RuntimeError, match="tf32 products inside a call with ieee"), switches.held("tf32"):
            pass
        assert now() == ("ieee", "ieee", False)
    assert now() == programs_own
    with pytest.raises(ValueError, match="'bf16'"), switches.held("bf16"):
        pass


def test_a_switch_set_during_a_call_is_not_restored():
    switches = ProcessSwitches()
    call = opened(Call(switches))
    MATMUL.fp32_precision = "none"
    call.finish()
    assert now() == ("tf32", "none", True)


def test_other_threads_keep_their_gradients_and_autocast(programs_own):
    with torch.autocast("cpu", torch.bfloat16):
        with own_arithmetic(torch.device("cpu")):
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            seen = []
            thread = threading.Thread(target=lambda: seen.append(torch.is_grad_enabled()))
            thread.start()
            thread.join(LONG_S)
            assert seen == [True]
            assert now() == programs_own  # a CPU has no switch to set
        assert torch.is_autocast_enabled("cpu")
