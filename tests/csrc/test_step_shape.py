"""Which path a step takes on a GPU: csrc/cuda/step_shape.h decides from the GPU, the batch and the state."""

from __future__ import annotations

import pytest
import torch
from emulated import Case, Limits, emulate

from pydeq.ops.constants import CudaPath

METHODS = ("picard", "anderson", "broyden", "gmres")
COLUMNS = ("valid", "launches", "cluster", "blocks", "threads", "tiles", "shared_bytes", "scratch_bytes")
# What cudaDeviceGetAttribute says of an H200, and of an A100, which has no clusters.
H200 = {"shared_bytes": 227 << 10, "cluster_blocks": 8, "tile_threads": 256, "multiprocessors": 132}
A100 = {"shared_bytes": 163 << 10, "cluster_blocks": 1, "tile_threads": 256, "multiprocessors": 108}


def shapes(*rows: tuple, gpu: dict = H200, path: CudaPath = CudaPath.AUTO, last: bool = False) -> list[dict]:
    """How steps would be laid out: a row is (method, batch, state, dtype, step)."""
    tests = []
    for method, batch, state, dtype, step in rows:
        memory = 5 if method == "anderson" else 50
        arguments = {
            "dtype_of": torch.zeros(1, dtype=dtype), "shape": torch.zeros(len(COLUMNS), dtype=torch.int64),
            "method": METHODS.index(method), "batch": batch, "state": state, "step": step, "memory": memory,
            "stored": min(step + 1, memory), "damping": 1.0, "rtol": 1e-3, "atol": 0.0, "eps": 1e-7, "freeze": True,
            "stall": True, "last": last,
        }  # fmt: skip
        tests.append(Case("step_shape", arguments, Limits(**gpu, path=path)))
    results = [dict(zip(COLUMNS, result.arguments["shape"].tolist(), strict=True)) for result in emulate(tests)]
    assert all(shape["valid"] for shape in results)
    return results


def way(shape: dict) -> str:
    return "split" if shape["launches"] == 2 else "cluster" if shape["cluster"] > 1 else "block"


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_sample_of_a_large_state_does_not_leave_a_gpu_idle(method):
    """A cluster would keep 8 of an H200's 132 multiprocessors busy."""
    (one,) = shapes((method, 1, 65536, torch.float32, 4))
    assert way(one) == "split"
    assert one["blocks"] == one["tiles"] >= 32


def test_eight_samples_of_a_large_state():
    """Clusters keep 64 multiprocessors busy: too few for float32, enough for half as many bytes."""
    wide, narrow = shapes(*(("anderson", 8, 65536, dtype, 4) for dtype in (torch.float32, torch.bfloat16)))
    assert (way(wide), wide["blocks"]) == ("split", 256)
    assert (way(narrow), narrow["blocks"]) == ("cluster", 64)


def test_a_second_launch_must_pay():
    """Plain iteration reads two vectors: spreading them over more multiprocessors saves less than a launch."""
    assert {way(shape) for shape in shapes(*(("picard", b, 65536, torch.float32, 4) for b in (1, 8)))} == {"cluster"}


@pytest.mark.parametrize("method", METHODS)
def test_the_suites_other_shapes_take_one_launch(method):
    small, middle = shapes((method, 32, 512, torch.float32, 4), (method, 32, 8192, torch.float32, 4))
    assert way(small) == "block"
    assert way(middle) == "cluster"
    assert middle["blocks"] >= 128


def test_small_states_take_one_launch_for_every_batch():
    for batch in (1, 7, 132, 5000):
        assert {way(shape) for shape in shapes(*((m, batch, 512, torch.float32, 4) for m in METHODS))} == {"block"}


def test_many_samples_need_no_clusters():
    """As many bytes for each multiprocessor, and no barrier of a cluster."""
    assert way(shapes(("anderson", 2000, 8192, torch.float32, 4))[0]) == "block"
    assert way(shapes(("anderson", 2000, 65536, torch.float32, 4))[0]) == "cluster"


def test_gpus_without_clusters():
    few, many = shapes(("anderson", 8, 8192, torch.float32, 4), ("anderson", 2000, 8192, torch.float32, 4), gpu=A100)
    assert (way(few), way(many)) == ("split", "block")


def test_a_gpu_that_is_not_known_takes_one_launch_where_it_fits():
    unknown = {**H200, "multiprocessors": 0}
    (shape,) = shapes(("anderson", 1, 65536, torch.float32, 4), gpu=unknown)
    assert (way(shape), shape["cluster"]) == ("cluster", 8)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("path", [CudaPath.BLOCK, CudaPath.CLUSTER, CudaPath.SPLIT])
def test_a_path_that_is_forced_is_taken_where_it_fits(path, last):
    rows = [("picard", batch, 8192, torch.float32, 4) for batch in (1, 500)]
    assert {way(shape) for shape in shapes(*rows, path=path, last=last)} == {path.name.lower()}
    # What a block would have to keep of this history fits no shared memory.
    wide = ("broyden", 8, 65536, torch.float64, 40)
    assert way(shapes(wide, path=path)[0]) == "split"
    # A sample of one tile has one block, in a cluster, too.
    (one,) = shapes(("anderson", 3, 100, torch.float32, 2), path=path)
    assert way(one) == ("split" if path == CudaPath.SPLIT else "block")


@pytest.mark.parametrize("method", METHODS)
def test_tiles_do_not_depend_on_the_path(method):
    """Nor on batch and GPU: so sums do not."""
    rows = [(method, batch, 30000, torch.float16, 6) for batch in (1, 30, 3000)]
    tiles = set()
    for gpu in (H200, A100):
        for path in CudaPath:
            tiles |= {shape["tiles"] for shape in shapes(*rows, gpu=gpu, path=path)}
    assert len(tiles) == 1
