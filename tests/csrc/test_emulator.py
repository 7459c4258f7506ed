"""The emulator finds what it is there to find: a kernel with one fault of each kind."""

from __future__ import annotations

import pytest
import torch
from emulated import Case, EmulatorError, emulate

from pydeq.testing import tolerance

FAULTS = (
    "none",
    "removed_barrier",
    "lost_update",
    "early_exit",
    "divergent_warp",
    "off_by_one_tail",
    "uninitialized_shared",
    "misaligned_pack",
    "unwritten_output",
    "missing_fence",
    "slice_overrun",
    "none_in_a_cluster",
    "removed_cluster_barrier",
    "peer_not_begun",
    "peer_returned",
    "early_exit_in_a_cluster",
    "slice_overrun_of_a_peer",
    "misaligned_slice",
)
BATCH, STATE = 5, 131  # a row has a tail, and every other one is not aligned


def specimen(fault: str, seed: int = 0, state: int = STATE) -> Case:
    generator = torch.Generator().manual_seed(seed)
    arguments = {
        "x": torch.randn(BATCH, state, generator=generator),
        "y": torch.full((BATCH,), torch.nan),
        "partial": torch.full((BATCH,), torch.nan),
        "total": torch.full((1,), torch.nan),
        "done": torch.zeros(1, dtype=torch.int32),
        "fault": FAULTS.index(fault),
    }
    return Case("specimen", arguments, seed=seed)


def is_right(case: Case, result) -> bool:
    x, got = case.arguments["x"].double(), result.arguments
    allowed = tolerance(torch.float32, x.numel()) * x.abs().sum()
    sums = (got["y"].double() - x.sum(1)).abs()
    whole = (got["total"].double() - x.sum()).abs()
    return bool((sums <= allowed).all() and (whole <= allowed).all()) and int(got["done"]) == BATCH


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("fault", ["none", "none_in_a_cluster"])
def test_finds_nothing_where_nothing_is(fault, sanitizer):
    tests = [specimen(fault, seed) for seed in range(10)]
    assert all(map(is_right, tests, emulate(tests, sanitizer)))


@pytest.mark.parametrize(
    ("fault", "sanitizer", "message"),
    [
        ("removed_barrier", "thread", "ThreadSanitizer: data race"),
        ("lost_update", "thread", "ThreadSanitizer: data race"),
        ("missing_fence", "thread", "ThreadSanitizer: data race"),
        ("early_exit", "address", "deadlock.*threads have returned.*threads wait in block_sync at "),
        ("divergent_warp", "address", "meet at different places: warp_sum at .*, warp_sum at "),
        ("off_by_one_tail", "address", "AddressSanitizer: heap-buffer-overflow"),
        ("slice_overrun", "address", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned_pack", "address", "misaligned load_pack of 16 bytes"),
        ("removed_cluster_barrier", "thread", "ThreadSanitizer: data race"),
        ("peer_not_begun", "address", "a peer's shared memory before it is known to have begun"),
        (
            "early_exit_in_a_cluster",
            "address",
            "deadlock.*threads wait in cluster_sync at .*of its cluster, 384 threads have returned",
        ),
        ("slice_overrun_of_a_peer", "address", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned_slice", "address", "misaligned slice of shared memory: at 2, of a type aligned to 4 bytes"),
    ],
)
def test_ends_with_a_message(fault, sanitizer, message):
    for seed in range(3):
        with pytest.raises(EmulatorError, match=f"(?s){message}"):
            emulate([specimen(fault, seed, state=90 if fault == "early_exit" else STATE)], sanitizer)


def test_finds_a_peer_that_has_returned():
    """All eight blocks but the leader may return early: of ten schedules, one at the least lets one of them."""
    with pytest.raises(EmulatorError, match=r"shared memory of a peer that returns|AddressSanitizer: use-after-poison"):
        emulate([specimen("peer_returned", seed) for seed in range(10)])


@pytest.mark.parametrize("fault", ["removed_barrier", "uninitialized_shared", "unwritten_output"])
def test_results_are_wrong(fault):
    """On every seed: a schedule that only sometimes finds a fault is worth little."""
    tests = [specimen(fault, seed) for seed in range(40)]
    assert not any(map(is_right, tests, emulate(tests)))
