"""Finding nvcc and choosing GPU architectures, in csrc/cuda_toolkit.py."""

from __future__ import annotations

import runpy
import stat
from pathlib import Path

import pytest

TOOLKIT = runpy.run_path(str(Path(__file__).parent.parent / "csrc" / "cuda_toolkit.py"))
KNOWN = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")
CudaError = TOOLKIT["CudaError"]


def fake_tool(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_nvcc(folder: Path, release: str = "13.0", archs: tuple[str, ...] = KNOWN) -> Path:
    listed = "\\n".join("compute_" + arch.replace(".", "") for arch in archs)
    version = f"Cuda compilation tools, release {release}, V{release}.88"
    return fake_tool(
        folder / "nvcc", f'case $1 in --version) echo "{version}";; --list-gpu-arch) printf "{listed}\\n";; esac'
    )


@pytest.mark.parametrize(
    ("text", "cmake"),
    [
        ("8.0", "80-real"),
        ("8.0;9.0+PTX", "80-real;90"),
        ("8.0 8.6,9.0", "80-real;86-real;90-real"),
        ("9.0a", "90a-real"),
        ("10.0f+PTX", "100f"),
        ("12.0;12.0+PTX", "120"),
        ("12.0+PTX;12.0", "120"),
        ("Hopper", "90"),
        ("ampere;9.0", "80-real;86;90-real"),
        ("Hopper+PTX", "90"),
    ],
)
def test_translates_what_torch_takes(text, cmake):
    assert TOOLKIT["translate"](text, KNOWN) == cmake


@pytest.mark.parametrize("text", ["5.2", "8.0;99.0", "sm_80", "80", "8.0+ptx?", "Kepler", "9.0x"])
def test_refuses_what_nvcc_does_not_know(text):
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST must name .* that nvcc knows .* got"):
        TOOLKIT["translate"](text, KNOWN)


def test_refuses_an_empty_list():
    with pytest.raises(ValueError, match="names no architecture"):
        TOOLKIT["translate"](" ; ", KNOWN)


def test_a_wheel_is_for_all_that_this_nvcc_knows():
    assert TOOLKIT["default_archs"](KNOWN) == "80-real;86-real;89-real;90;100-real;120"
    assert TOOLKIT["default_archs"](("8.0", "9.0", "11.0")) == "80-real;90"


def test_reads_what_nvcc_prints():
    assert TOOLKIT["parse_version"]("Cuda compilation tools, release 12.8, V12.8.61") == (12, 8)
    assert TOOLKIT["parse_archs"]("compute_75\ncompute_90\ncompute_100\ncompute_121\n") == (
        "7.5",
        "9.0",
        "10.0",
        "12.1",
    )
    with pytest.raises(ValueError, match="no release"):
        TOOLKIT["parse_version"]("gcc 12")


def test_nvcc_is_looked_for_where_the_environment_says(tmp_path):
    named, home, path = (fake_nvcc(tmp_path / name / "bin") for name in ("named", "home", "path"))
    find = TOOLKIT["find_nvcc"]
    environment = {"CUDACXX": str(named), "CUDA_HOME": str(home.parent.parent), "PATH": str(path.parent)}
    assert find(environment) == str(named)
    del environment["CUDACXX"]
    assert find(environment) == str(home)
    del environment["CUDA_HOME"]
    assert find(environment) == str(path)
    assert find({"CUDACXX": str(tmp_path / "none"), "PATH": str(path.parent)}) == ""


def choose(tmp_path: Path, local: bool = False, release: str = "13.0", **environment: str):
    folder = fake_nvcc(tmp_path / "bin", release).parent
    return TOOLKIT["choose"]({"CUDACXX": str(folder / "nvcc"), **environment}, local)


def test_chooses_the_toolkit_it_found(tmp_path):
    toolkit, archs = choose(tmp_path)
    assert (toolkit.version, toolkit.archs) == ("13.0", KNOWN)
    assert archs == "80-real;86-real;89-real;90;100-real;120"
    assert choose(tmp_path, TORCH_CUDA_ARCH_LIST="8.9")[1] == "89-real"
    assert choose(tmp_path, local=True, TORCH_CUDA_ARCH_LIST="8.9")[1] == "89-real"


def test_a_developer_builds_for_the_gpus_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "tools"), prepend=None)
    assert choose(tmp_path, local=True)[1] == "90-real"  # no nvidia-smi
    fake_tool(tmp_path / "tools" / "nvidia-smi", "echo 8.9; echo 8.6; echo 8.9")
    assert choose(tmp_path, local=True)[1] == "86-real;89-real"


def test_too_old_a_toolkit_is_refused(tmp_path):
    with pytest.raises(CudaError, match=r"is of CUDA 12\.6, and 12\.8 or later is needed"):
        choose(tmp_path, release="12.6")
    assert choose(tmp_path, release="12.8")[0].version == "12.8"


def test_switches(tmp_path):
    with pytest.raises(CudaError, match="PYDEQ_WITH_CUDA=0"):
        choose(tmp_path, PYDEQ_WITH_CUDA="0")
    with pytest.raises(CudaError, match="PYDEQ_SANITIZE"):
        choose(tmp_path, PYDEQ_SANITIZE="address")
    with pytest.raises(ValueError, match="PYDEQ_WITH_CUDA must be 0 or 1, got 'yes'"):
        choose(tmp_path, PYDEQ_WITH_CUDA="yes")
    assert choose(tmp_path, PYDEQ_WITH_CUDA="1")[0].version == "13.0"


def test_no_nvcc_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(CudaError, match=r"no nvcc was found .*CUDACXX, CUDA_HOME and PATH"):
        TOOLKIT["choose"]({"CUDACXX": str(tmp_path / "none")}, False)


def test_an_nvcc_that_does_not_run_says_so(tmp_path):
    broken = fake_tool(tmp_path / "nvcc", "exit 3")
    with pytest.raises(CudaError, match="does not run"):
        TOOLKIT["choose"]({"CUDACXX": str(broken)}, False)
