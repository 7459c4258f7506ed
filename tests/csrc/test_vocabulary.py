"""Device code keeps to the vocabulary of csrc/cuda/simt.cuh, which the emulator has too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent.parent / "csrc"
VOCABULARY = CSRC / "cuda" / "simt.cuh"

# What device code must not say, and what it says instead.
FORBIDDEN = {
    r"\basm\b": "no inline PTX",
    r"cooperative_groups|\bcg::": "block_sync and warp_sync",
    r"\bcuda::": "the vocabulary",
    r"\b__(syncthreads|syncwarp|barrier)\w*": "block_sync or warp_sync",
    r"\b__(shfl|any|all|ballot|activemask|match|reduce)\w*": "warp_sum, warp_broadcast, warp_shuffle_xor or warp_any",
    r"\b__threadfence\w*": "fence_device or fence_system",
    r"\batomic[A-Z]\w*": "atomic_add, of integers",
    r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b": "thread_index, block_index, block_threads, grid_blocks",
    r"\b__(shared|device|global|constant|managed|launch_bounds|grid_constant)__": "PYDEQ_SHARED, PYDEQ_KERNEL, ...",
    r"\b__(restrict|ldg|ldcg|ldcs|stcg|stcs|builtin_assume)\w*": "load_pack and store_pack",
    r"\bvolatile\b": "barriers and fences",
    r"\bextern\b": "shared_slice",
    r"^\s*(static|thread_local)\s+\w+\s+\w+\s*(=|;|\[)": "no state outlives a kernel",
    r"\b(u?int[24]|float[24]|double2|half2?|__half\w*|__nv_bfloat16\w*)\b(?!_t)": "Pack, widen and narrow",
    r"\b(printf|assert|malloc|new)\b": "nothing: the host checks",
    r"<<<": "a launch belongs into the .cu file",
    r"#\s*include\s*<(?!cstdint>)": "the vocabulary needs no header but <cstdint>",
    r"torch|ATen|c10": "device code knows no torch",
}


def code(text: str) -> str:
    """Without comments and strings; lines stay where they are."""
    text = re.sub(r"/\*.*?\*/", lambda match: re.sub(r"[^\n]", "", match[0]), text, flags=re.DOTALL)
    return re.sub(r'"[^"\n]*"|//[^\n]*', lambda match: '""' if match[0].startswith('"') else "", text)


def violations(text: str) -> list[str]:
    """Line and rule of whatever is not allowed; includes keep their names."""
    found = []
    for number, line in enumerate(code(text).splitlines(), 1):
        for pattern, instead in FORBIDDEN.items():
            if re.search(pattern, line):
                found.append(f"{number}: {line.strip()!r}: {instead}")
    return found


def device_files() -> list[Path]:
    return sorted(path for path in CSRC.glob("**/*.cuh") if path != VOCABULARY)


@pytest.mark.parametrize("path", device_files(), ids=lambda path: path.name)
def test_device_code_keeps_to_the_vocabulary(path):
    assert not violations(path.read_text())


def test_every_operation_with_device_code_says_what_it_does():
    """A kernel's file opens with its mathematics, its threads, and what it reads and writes."""
    files = [*CSRC.glob("cuda/*_step.cuh"), *(path.with_suffix(".cuh") for path in CSRC.glob("cuda/*.cu"))]
    steps = {"picard_step.cuh", "anderson_step.cuh", "broyden_step.cuh", "gmres_step.cuh"}
    assert steps | {"squared_norm.cuh", "random_probes.cuh"} <= {f.name for f in files}
    for path in files:
        opening = path.read_text().split("#pragma once")[0]
        for word in ("=", "threads", "block", "reads", "writes", "b, d]"):
            assert word in opening.lower(), f"{path.name} opens without {word!r}"


@pytest.mark.parametrize(
    "line",
    [
        'asm volatile("bar.sync 0;");',
        "namespace cg = cooperative_groups;",
        "cg::this_grid().sync();",
        "__syncthreads();",
        "x += __shfl_down_sync(~0u, x, 1);",
        "atomicAdd(total, 1.0f);",
        "__threadfence();",
        "int t = threadIdx.x;",
        "__shared__ float buffer[32];",
        "__device__ int counter;",
        "static int calls = 0;",
        "  x = __ldg(p);",
        "volatile int* flag;",
        "const float4 v = *p;",
        "#include <cuda_runtime.h>",
        "kernel<<<1, 2>>>();",
        "printf(format);",
    ],
)
def test_lint_refuses(line):
    assert violations(f"// fine\n{line}\n")


@pytest.mark.parametrize("line", ["// __syncthreads() would do", "block_sync();", "static constexpr int kPack = 4;"])
def test_lint_allows(line):
    assert not violations(line)
