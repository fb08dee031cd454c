"""States of clips between steps: how often they are copied, when their memory is freed, and that parked ones have the same bits."""

from __future__ import annotations

import math
import random
import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.encoder import Encoder
from pipeline.encoder.clip_states import ClipStates
from pipeline.encoder.staging import HostStaging
from tests.engine.test_encoder import CONFIG, alone, clip

CHUNKS, CLIPS = 4, 4


class CopiedBytes(TorchDispatchMode):
    """Bytes that operators wrote into fresh memory."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if all(value.alias_info is None for value in function._schema.returns):
            self.total += sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(result))
        return result


class FakeDevice(HostStaging):
    """Staging of a device whose memory is reused at once: what was parked is overwritten there."""

    def __init__(self):
        super().__init__()
        self.parked = self.unparked = 0

    def park(self, tensor):
        host = tensor.clone()
        tensor.fill_(float("nan"))
        self.parked += tensor.nbytes
        return host

    def unpark(self, tensor):
        self.unparked += tensor.nbytes
        return tensor.clone()


@pytest.fixture(scope="module")
def clips():
    return [clip(seed, CHUNKS) for seed in range(CLIPS)]


@pytest.fixture(scope="module")
def expected(clips):
    encoder = Encoder(CONFIG, "cpu", "float32")
    return [alone(encoder, chunks) for chunks in clips]


@pytest.fixture
def encoder():
    return Encoder(CONFIG, "cpu", "float32", batch=CLIPS)


def copied(encoder, monkeypatch, chunks, states):
    """Runs a step; its launch, and the bytes of states copied outside the network, in states of one clip."""
    real, after = encoder._vae.encode_planes, []

    def uncounted(*arguments, **options):
        with torch.utils._python_dispatch._disable_current_modes():
            after.append(real(*arguments, **options))
        return after[-1]

    with monkeypatch.context() as patch, CopiedBytes() as bytes_:
        patch.setattr(encoder._vae, "encode_planes", uncounted)
        launched = encoder.launch(chunks, states)
    return launched, bytes_.total / (after[0][1].nbytes / after[0][1].batch)


def test_batch_that_stays_together_is_not_copied_and_one_that_regroups_once(encoder, clips, expected, monkeypatch):
    parts = [[] for _ in clips]

    def step(number, order, before):
        launched, copies = copied(encoder, monkeypatch, [clips[i][number] for i in order], before)
        for i, result in zip(order, launched.results(), strict=True):
            parts[i].append(result.mean_Cthw)
        return launched.states, copies

    states, copies = step(0, [0, 1, 2, 3], [None] * 4)
    assert copies == 0
    states, copies = step(1, [0, 1, 2, 3], states)
    assert copies == 0
    (three, one, zero, two), copies = step(2, [3, 1, 0, 2], [states[3], states[1], states[0], states[2]])
    assert copies == 0  # the same clips
    _, copies = step(3, [3, 1, 0], [three, one, zero])  # the last one waits
    assert copies == 3
    _, copies = step(3, [2], [two])
    assert copies == 0
    for got, want in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(got, axis=1), want)


def test_only_states_of_clips_that_continue_are_kept(encoder, clips):
    ends = [replace(chunks[0], last=True) for chunks in clips[:3]]
    states = encoder.launch([*ends, clips[3][0]], [None] * 4).states
    assert states[:3] == [None] * 3
    one = encoder.launch([clips[3][0]], [None]).states
    assert encoder._states.device_bytes == 2 * one[0].stack.state.nbytes


def test_a_waiting_clip_does_not_keep_its_batch_in_memory(encoder, clips, expected):
    states = encoder.launch([chunks[0] for chunks in clips], [None] * 4).states
    whole = weakref.ref(states[0].stack)
    size = encoder._states.device_bytes // 4
    for number in (1, 2):  # the other three go on
        states[:3] = encoder.launch([chunks[number] for chunks in clips[:3]], states[:3]).states
    assert whole() is None
    assert encoder._states.device_bytes == 4 * size
    parts = [encoder.launch([clips[3][0]], [None]).results()[0].mean_Cthw]
    for number in range(1, CHUNKS):
        launched = encoder.launch([clips[3][number]], states[3:])
        parts.append(launched.results()[0].mean_Cthw)
        states[3:] = launched.states
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected[3])
    del states, launched
    assert encoder._states.device_bytes == 0


@pytest.mark.parametrize("clips_on_device", [0, 1, 3])
def test_parked_states_have_the_same_bits(encoder, clips, expected, clips_on_device):
    """Pairs take turns, and change: those that wait are parked, and what the device holds stays within the budget after each step."""
    one = encoder.launch([clips[0][0]], [None]).states[0].stack.state.nbytes
    device, budget = FakeDevice(), clips_on_device * one
    encoder._states = ClipStates(encoder._vae, device, budget)
    states, parts = [None] * CLIPS, [[] for _ in clips]
    for number in range(CHUNKS):
        for pair in ((0, 1), (2, 3)) if number % 2 else ((1, 2), (0, 3)):
            launched = encoder.launch([clips[i][number] for i in pair], [states[i] for i in pair])
            for i, state, result in zip(pair, launched.states, launched.results(), strict=True):
                states[i] = state
                parts[i].append(result.mean_Cthw)
            assert encoder._states.device_bytes <= budget
    assert device.parked >= device.unparked > 0
    for got, want in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(got, axis=1), want)


def test_a_step_without_memory_parks_waiting_states_before_it_is_halved(encoder, clips, expected, monkeypatch):
    device = FakeDevice()
    encoder._states = ClipStates(encoder._vae, device, 1 << 30)
    waiting = encoder.launch([chunks[0] for chunks in clips[:2]], [None] * 2).states
    real, batches = encoder._vae.encode_planes, []

    def encode_planes(planes_BT3HW, *arguments, **options):
        batches.append(planes_BT3HW.shape[0])
        if encoder._states.device_bytes:  # they take the memory that this step needs
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return real(planes_BT3HW, *arguments, **options)

    monkeypatch.setattr(encoder._vae, "encode_planes", encode_planes)
    launched = encoder.launch([chunks[0] for chunks in clips[2:]], [None] * 2)
    assert batches == [2, 2]
    assert encoder.largest_batch(clips[0][0].shape) == CLIPS  # nothing was learned of this size
    for result, want in zip(launched.results(), expected[2:], strict=True):
        np.testing.assert_array_equal(result.mean_Cthw, want[:, : result.mean_Cthw.shape[1]])
    monkeypatch.setattr(encoder._vae, "encode_planes", real)
    for result, want in zip(encoder.encode([c[1] for c in clips[:2]], waiting), expected[:2], strict=True):
        np.testing.assert_array_equal(result.mean_Cthw, want[:, 2:3])


@dataclass(frozen=True)
class Sum:
    """State of a network that only adds up: one number for each clip."""

    tensors: tuple[torch.Tensor]

    @property
    def batch(self):
        return self.tensors[0].shape[0]

    @property
    def nbytes(self):
        return self.tensors[0].nbytes


class Adding:
    """Network whose state after a step is a clip's sum so far."""

    def stack_states(self, states):
        return Sum((torch.cat([state.tensors[0] for state in states]),))

    def split_state(self, state, which):
        return [Sum((state.tensors[0][place : place + 1].clone(),)) for place in which]


@pytest.mark.parametrize("seed", range(100))
def test_a_clip_never_gets_the_state_of_another(seed):
    """Clips begin, regroup, wait, end or are abandoned in any order, on a device of any budget whose parked memory is overwritten."""
    choice = random.Random(seed)
    budget = choice.choice([None, 0, 8, 24, 64, 200])
    kept = ClipStates(Adding(), FakeDevice(), budget)
    states, sums = {}, {}
    for step in range(60):
        if choice.random() < 0.2:
            kept.park(choice.choice([0, 16]))  # a step ran out of memory
        waiting = list(states)
        clips = choice.sample(waiting, choice.randint(0, min(6, len(waiting))))
        before = (
            kept.gather([states[name] for name in clips]).tensors[0] if clips else torch.zeros(choice.randint(1, 6), 1)
        )
        clips = clips or [f"{step} {n}" for n in range(len(before))]  # all begin or none does
        assert before[:, 0].tolist() == [sums.get(name, 0) for name in clips]
        added = [choice.randrange(1000) for _ in clips]
        sums |= {name: sums.get(name, 0) + more for name, more in zip(clips, added, strict=True)}
        after, last = Sum((before + torch.tensor(added)[:, None],)), choice.random()
        continuing = [place for place in range(len(clips)) if choice.random() < last]
        new = kept.keep(after, continuing, [None] * len(continuing))
        for taken in clips:  # as in a step, which still refers to them
            states.pop(taken, None)
        states |= zip([clips[place] for place in continuing], new, strict=True)
        if choice.random() < 0.1 and states:
            del states[choice.choice(list(states))]
        del new, after, before
        assert len({(id(state.stack), state.place) for state in states.values()}) == len(states)
        assert kept.device_bytes == sum(s.state.nbytes for s in {s.stack for s in states.values()} if not s.parked)
        assert kept.device_bytes <= (math.inf if budget is None else budget)


@pytest.mark.parametrize("budget", [0, 1, 2, 3])
def test_states_of_the_newest_batch_are_parked_once_each_by_itself(budget):
    """Two of five clips continue, so that their batch is copied together before it is parked."""
    device = FakeDevice()
    kept = ClipStates(Adding(), device, budget * 4)
    states = kept.keep(Sum((torch.arange(5.0)[:, None],)), [3, 4], [None] * 2)
    assert device.parked == (0 if budget >= 2 else 8)
    assert kept.gather(states).tensors[0][:, 0].tolist() == [3, 4]
