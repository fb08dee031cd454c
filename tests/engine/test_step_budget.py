"""Step sizes: from free memory, measured on a first step, halved when memory runs out, remembered per frame size."""

from pipeline.encoder.step_budget import SAFE_SHARE, StepBudget

CHUNK = (16, 64, 64)
PIXELS = 16 * 64 * 64


def test_step_size_follows_pixels_where_free_memory_is_unknown():
    budget = StepBudget(target=8 * PIXELS)
    assert budget.chunks(*CHUNK) == 8
    assert budget.chunks(16, 512, 512) == 1
    assert not budget.too_long(16, 512, 512)
    budget.ran(3, *CHUNK, peak_bytes=10**12)
    assert budget.chunks(*CHUNK) == 8


def test_the_first_step_is_one_chunk_and_is_measured():
    budget = StepBudget(target=64 * PIXELS, free_bytes=lambda: 10_000)
    assert budget.chunks(*CHUNK) == 1
    budget.ran(1, *CHUNK, peak_bytes=1_000)
    assert budget.chunks(*CHUNK) == int(SAFE_SHARE * 10)
    assert budget.chunks(8, 64, 64) == int(SAFE_SHARE * 20)  # half the frames, twice the chunks
    assert budget.chunks(16, 128, 128) == 1  # another size is measured for itself
    budget.ran(7, *CHUNK, peak_bytes=3_500)  # larger steps cost less a chunk than the first
    assert budget.chunks(*CHUNK) == int(SAFE_SHARE * 20)
    budget.ran(2, *CHUNK, peak_bytes=9_000)  # a smaller one teaches nothing
    assert budget.chunks(*CHUNK) == int(SAFE_SHARE * 20)


def test_memory_of_carried_states_is_counted():
    free = [10_000]
    budget = StepBudget(target=64 * PIXELS, free_bytes=lambda: free[0])
    budget.ran(1, *CHUNK, peak_bytes=400, carried_bytes=600)
    assert budget.chunks(*CHUNK) == int(SAFE_SHARE * 10)
    free[0] = 4_000
    assert budget.chunks(*CHUNK) == int(SAFE_SHARE * 4)
    free[0] = 0
    assert budget.chunks(*CHUNK) == 1


def test_step_is_limited_by_the_device_and_by_the_job():
    budget = StepBudget(target=4 * PIXELS, free_bytes=lambda: 10**9)
    budget.ran(1, *CHUNK, peak_bytes=10)
    assert budget.chunks(*CHUNK) == 4
    budget = StepBudget(target=4 * PIXELS, fixed=2, free_bytes=lambda: 10**9)
    budget.ran(1, *CHUNK, peak_bytes=10)
    assert budget.chunks(*CHUNK) == 2


def test_size_that_did_not_fit_is_not_tried_again():
    budget = StepBudget(target=64 * PIXELS, free_bytes=lambda: 10**9)
    budget.ran(1, *CHUNK, peak_bytes=10)
    budget.ran_out(16, *CHUNK)
    assert budget.chunks(*CHUNK) == 8
    budget.ran(8, *CHUNK, peak_bytes=10)  # a hopeful measurement does not lift the limit
    assert budget.chunks(*CHUNK) == 8
    budget.ran_out(1, *CHUNK)
    assert budget.too_long(*CHUNK)
    assert not budget.too_long(15, 64, 64)
    assert not budget.too_long(16, 32, 32)
    assert budget.choices() == {"16x64x64": 8}
