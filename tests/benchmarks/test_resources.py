"""benchmarks/resources.py reads what nvcc prints, and its published table keeps the promises of the kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import resources

PRINTED = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5pydeq18step_reduce_kernelINS_9GmresStepIfEEEEvNT_4ArgsENS_9StepShapeEPh' \
for 'sm_90'
ptxas info    : Function properties for _ZN5pydeq18step_reduce_kernelINS_9GmresStepIfEEEEvNT_4ArgsENS_9StepShapeEPh
    72 bytes stack frame, 112 bytes spill stores, 340 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 72 bytes cumulative stack size
ptxas info    : Compiling entry function '_ZN5pydeq19squared_norm_kernelINS_8BFloat16EEEvNS_15SquaredNormArgsEPh' for \
'sm_120'
ptxas info    : Function properties for _ZN5pydeq19squared_norm_kernelINS_8BFloat16EEEvNS_15SquaredNormArgsEPh
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 57 registers, used 1 barriers, 16 bytes smem
"""
CSRC = Path(resources.ROOT, "csrc")


def test_reads_what_nvcc_prints():
    gmres, norm = resources.parse(PRINTED)
    assert gmres == {
        "kernel": "gmres_step: reduce",
        "dtype": "float32",
        "arch": "9.0",
        "registers": 128,
        "spill_stores": 112,
        "spill_loads": 340,
        "stack": 72,
        "static_shared": 0,
        "warps_by_registers": 16,
    }
    assert (norm["kernel"], norm["dtype"], norm["arch"]) == ("squared_norm", "bfloat16", "12.0")
    assert norm["static_shared"] == 16
    assert norm["warps_by_registers"] == 65536 // (64 * 32)


def test_looks_for_the_disassembler_beside_nvcc_and_on_the_path(tmp_path, monkeypatch):
    beside, on_path = tmp_path / "cuda" / "nvdisasm", tmp_path / "bin" / "nvdisasm"
    for program in (beside, on_path):
        program.parent.mkdir()
        program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(on_path.parent))
    nvcc = str(beside.parent / "nvcc")
    assert resources.find_disassembler(nvcc) == str(beside)
    beside.unlink()
    assert resources.find_disassembler(nvcc) == str(on_path)
    on_path.unlink()
    with pytest.raises(SystemExit, match=r"nvdisasm is neither next to .*nvcc nor on PATH"):
        resources.find_disassembler(nvcc)


def test_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="no numbers for"):
        resources.parse("Compiling entry function '_ZN5pydeq19squared_norm_kernelIdEEvS_' for 'sm_90'\n")
    with pytest.raises(ValueError, match="not a kernel of pydeq: _Z3foov"):
        resources.readable("_Z3foov")


@pytest.fixture
def published() -> dict:
    return json.loads(resources.OUT.read_text())


def test_every_kernel_is_published_on_every_architecture(published):
    archs = {row["arch"] for row in published["kernels"]}
    assert "9.0" in archs
    stems = {path.stem for path in [*CSRC.glob("cuda/*_step.cuh"), *CSRC.glob("cuda/*.cu")]}
    kernels = {
        f"{stem}: {part}" if stem.endswith("_step") else stem
        for stem in stems
        for part in (("fused", "reduce", "apply") if stem.endswith("_step") else ("",))
    }
    found = {(row["kernel"], row["dtype"], row["arch"]) for row in published["kernels"]}
    wanted = {(kernel, dtype, arch) for kernel in kernels for dtype in resources.DTYPES.values() for arch in archs}
    assert found == wanted
    # What a launch asks for, every kernel can have: 256 threads of a block.
    assert min(row["warps_by_registers"] for row in published["kernels"]) >= 8


def test_no_kernel_spills(published):
    assert not [row for row in published["kernels"] if row["spill_stores"] or row["spill_loads"]]


def test_halves_have_as_many_loads_under_way_as_float32(published):
    """Or, where one load brings a thread's whole share of a row, as many rows."""
    rows = {(row["kernel"], row["dtype"], row["arch"]): row for row in published["kernels"]}
    for (kernel, dtype, arch), row in rows.items():
        if dtype not in ("float16", "bfloat16") or not row["loads"]:
            continue
        assert row["loads_alone"] < row["loads"]
        single = rows[kernel, "float32", arch]["loads_under_way"]
        assert row["loads_under_way"] >= (single // 2 if kernel.startswith("picard_step") else min(8, single))


def test_traffic_is_published_within_a_tenth_of_the_design(published):
    assert {row["op"] for row in published["traffic"]} == {path.stem for path in CSRC.glob("cuda/*_step.cuh")}
    for row in published["traffic"]:
        assert row["ratio"] <= 1.1
        assert row["ratio"] == pytest.approx((row["reads"] + row["writes"]) / row["design"], abs=2e-3)
        assert row["launches"] == (2 if row["path"] == "two launches" else 1)
        assert row["dynamic_shared"] <= row["shared_available"]
