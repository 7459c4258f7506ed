#!/usr/bin/env bash
# Everything that needs a GPU, in one command and at most seven minutes, without network:
#
#     bash benchmarks/gpu_check.sh              on the machine with the GPU
#     bash benchmarks/gpu_check.sh --prepare    before, on a machine with network: libraries for GPUs of 9.0, and the
#                                               peers' wheels; prints what to take along in addition to the checkout
#
# The most important comes first: results on every path and the smallest times, then the comparison with torchdeq, solves
# in graphs, the tests, compute-sanitizer, Nsight Compute. Compiled libraries are used if they run here, and compiled if
# not. Each stage has its own time limit, and writes its results to OUT (default: benchmarks/out/gpu) one by one. So a stage
# that fails, crashes or hangs does not lose the results of the others. log.txt has the output of all stages. A short table
# comes last. The exit status is 1 if a stage failed or ran out of time.
#
# Needs Python with a CUDA build of torch, pytest and hypothesis; to compile, also cmake, ninja, pybind11, setuptools and
# nvcc. pytest-xdist and pytest-timeout are used if they are installed. Variables: PYTHON, another interpreter than python3;
# LIMIT, the seconds of each stage; TOTAL, the seconds of all; CARRY, the folder of wheels (default: benchmarks/out/carry).
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-$PWD/benchmarks/out/gpu}
wheels=${CARRY:-benchmarks/out/carry}
total=${TOTAL:-420}
at_most=64 # MiB that are carried to the other machine, the checkout among them
tests_at_once=${WORKERS:-8}

unset PYDEQ_KERNELS PYDEQ_ISA PYDEQ_SANITIZE PYDEQ_WITH_KERNELS PYDEQ_CUDA_PATH
export PYTHONUNBUFFERED=1 PYDEQ_REQUIRE_KERNELS=1

# --- Before: what is carried --------------------------------------------------------------------------------------------

prepare() {
  local carried=() file bytes
  PYDEQ_WITH_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} "$python" setup.py --quiet build_ext --inplace || return
  # A build without nvcc is not an error, and leaves an older library where it is.
  "$python" -c 'import sys, pydeq; sys.exit(pydeq.kernels().cuda_built is None)' || {
    echo "the build has no CUDA kernels: put nvcc on PATH, or name it by CUDACXX" >&2
    return 1
  }
  mkdir -p "$wheels"
  # torch and numpy, which it needs, are on every machine with a GPU for pydeq.
  "$python" -m pip download --quiet --no-deps --dest "$wheels" "$(grep -h '^torchdeq==' requirements/*.txt)" || return
  carried=(pydeq/libpydeq_*.so "$wheels"/*.whl) # they serve every Python version
  printf '%10s  %s\n' bytes file
  for file in "${carried[@]}"; do printf '%10d  %s\n' "$(stat --format=%s "$file")" "$file"; done
  bytes=$({ git ls-files -z --cached --others --exclude-standard; printf '%s\0' "${carried[@]}"; } |
    xargs -0 stat --format=%s 2> /dev/null | awk '{ sum += $1 } END { print sum + 0 }')
  printf '%10d  with the checkout, %d MiB of at most %d\n' "$bytes" $((bytes >> 20)) "$at_most"
  printf 'carry: %s %s\n' "$(echo pydeq/libpydeq_*.so)" "$wheels"
  [ $((bytes >> 20)) -lt "$at_most" ]
}

case ${1:-} in
  "") ;;
  --prepare) prepare; exit ;;
  *) echo "gpu_check.sh takes no argument, or --prepare, got $1" >&2; exit 2 ;;
esac

# --- Stages -------------------------------------------------------------------------------------------------------------

mkdir -p "$out"
: > "$out/log.txt"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
for wheel in "$(realpath -m "$wheels")"/*.whl; do # of Python alone, so that they are imported as they are
  if [ -f "$wheel" ]; then PYTHONPATH+=:$wheel; fi
done
names=() states=() times=()
stopped=""
trap 'stopped=TERM; kill -TERM "$running" 2> /dev/null' TERM
trap 'stopped=INT; kill -TERM "$running" 2> /dev/null' INT
running=""

# stage NAME SECONDS COMMAND...: runs it, its output to OUT/log.txt as it comes; its last lines, or with live=1 all of
# them, here. The command finds in $seconds what it may take to end by itself.
stage() {
  local name=$1 limit=${LIMIT:-$2} begin=$SECONDS from status viewer=""
  shift 2
  if [ -n "$stopped" ]; then return; fi
  if ((limit > total - begin)); then limit=$((total - begin)); fi
  if ((limit < 2)); then record "$name" "no time left" 0; return; fi
  printf '\n=== %s (at most %d s)\n' "$name" "$limit" | tee -a "$out/log.txt"
  from=$(($(stat --format=%s "$out/log.txt") + 1))
  seconds=$((limit > 10 ? limit - 4 : limit - 1)) timeout --kill-after=5 "$limit" bash -c '"$@"' stage "$@" >> "$out/log.txt" 2>&1 &
  running=$!
  if [ -n "${live:-}" ]; then
    tail --pid="$running" -s 0.2 -c "+$from" -f "$out/log.txt" &
    viewer=$!
  fi
  while :; do # a signal ends a wait, but not the stage
    wait "$running"
    status=$?
    kill -0 "$running" 2> /dev/null || break
  done
  if [ -n "$viewer" ]; then wait "$viewer"; else tail -c "+$from" "$out/log.txt" | tail -n "${lines:-12}"; fi
  if [ -n "$stopped" ]; then
    record "$name" "stopped" $((SECONDS - begin))
    return
  fi
  case $status in
    0) record "$name" passed $((SECONDS - begin)) ;;
    77) record "$name" "not run" $((SECONDS - begin)) ;;
    124 | 137) record "$name" "out of time" $((SECONDS - begin)) ;;
    *) record "$name" "failed ($status)" $((SECONDS - begin)) ;;
  esac
}

record() {
  names+=("$1") states+=("$2") times+=("$3")
  printf -- '--- %s: %s, %d s\n' "$1" "$2" "$3" | tee -a "$out/log.txt"
  {
    printf '{\n'
    for i in "${!names[@]}"; do
      printf '  "%s": {"state": "%s", "seconds": %d}' "${names[i]}" "${states[i]}" "${times[i]}"
      if ((i + 1 < ${#names[@]})); then printf ','; fi
      printf '\n'
    done
    printf '}\n'
  } > "$out/stages.json"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv
  nvcc --version | tail -n 2
  git rev-parse HEAD 2> /dev/null
  ls -l pydeq/*.so "${wheels:?}" 2> /dev/null
  "$python" -c 'import sys, torch; print(sys.version.split()[0], torch.__version__, torch.cuda.get_device_name())'
}

# Whether the libraries that are here run on this GPU.
libraries() { "$python" -m benchmarks.device usable; }

build() {
  PYDEQ_WITH_CUDA=1 "$python" setup.py --quiet build_ext --inplace || return
  libraries
}

measure() { "$python" -m benchmarks.device "$1" --out "$out" --seconds "$seconds"; }

# tests FILE: verbose, so that a stage that runs out of time leaves what it saw. A test that hangs ends its process, and
# another one goes on.
tests() {
  local options=()
  if "$python" -c 'import xdist' 2> /dev/null; then
    options+=(-n "$tests_at_once")
    if "$python" -c 'import pytest_timeout' 2> /dev/null; then options+=(--timeout 30 --timeout-method thread); fi
  elif "$python" -c 'import pytest_timeout' 2> /dev/null; then
    options+=(--timeout 30 --timeout-method signal)
  fi
  pytest_here "${options[@]}" "$1"
}

# The package is not installed here, so what its metadata says is not asked for.
pytest_here() {
  "$python" -m pytest -v --tb=short -p no:cacheprovider -p no:benchmark -W default \
    -o addopts="--strict-markers --strict-config -rfE" "$@"
}

# sanitizer TOOL PYTEST_OPTION...
sanitizer() {
  local tool=$1 filter choice status log=$out/sanitizer.log
  shift
  command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not here"; return 77; }
  # Only our kernels are checked; how that is said has changed between versions. What is tried here uses no CUDA, which
  # is an error unless allowed.
  filter=none
  for choice in "--kernel-name kns=pydeq" "--kernel-regex kns=pydeq" "--filter kns=pydeq" ""; do
    # shellcheck disable=SC2086
    if compute-sanitizer --require-cuda-init no $choice "$python" -c pass > /dev/null 2>&1; then filter=$choice; break; fi
  done
  if [ "$filter" = none ]; then echo "compute-sanitizer does not run here"; return 77; fi
  echo "compute-sanitizer --tool $tool $filter"
  # shellcheck disable=SC2086
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" $filter --error-exitcode 99 --print-limit 20 \
    "$python" -m pytest -v --tb=short -p no:cacheprovider -p no:benchmark -p no:xdist -W default \
    -o addopts="--strict-markers" -m sanitize "$@" tests/cuda 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  # A machine may forbid it: what then fails is the first allocation.
  if [ "$status" != 0 ] && grep -qi "device not supported\|not supported on this" "$log"; then status=77; fi
  rm -f "$log"
  return "$status"
}

# Nsight Compute, on three steps.
counters() {
  local status log=$out/counters.log
  command -v ncu > /dev/null || { echo "ncu is not here"; return 77; }
  ncu --clock-control none --profile-from-start off --kernel-name regex:step_ \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section LaunchStats --section Occupancy \
    --section WarpStateStats "$python" -m benchmarks.device counters 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  # A machine may forbid it.
  if [ "$status" != 0 ] && grep -q "ERR_NVGPUCTRPERM\|Failed to initialize the profiler" "$log"; then status=77; fi
  rm -f "$log"
  return "$status"
}

export python out wheels tests_at_once
export -f machine libraries build measure tests pytest_here sanitizer counters

failed() { [ "${states[-1]:0:6}" = failed ]; }

stage machine 45 machine # the first import of torch on a fresh machine is slow
if ! failed; then # torch sees a GPU
  stage libraries 30 libraries
  if failed; then stage build 200 build; fi
fi
case ${names[-1]}:${states[-1]} in
  libraries:passed | "libraries:out of time" | build:passed)
    live=1 stage first 60 measure first
    live=1 stage overhead 95 measure overhead
    live=1 stage captured 30 measure captured
    stage operations 60 tests tests/cuda/test_ops_on_a_gpu.py
    stage solves 55 tests tests/cuda/test_solves_on_a_gpu.py
    stage memcheck 35 sanitizer memcheck -k "float16 or aligned"
    stage racecheck 30 sanitizer racecheck -k "float16 and not 66000"
    lines=60 stage counters 25 counters
    ;;
esac

printf '\n'
"$python" -m benchmarks.device summary --out "$out"
printf '\n%-12s %-14s %s\n' stage result seconds
for i in "${!names[@]}"; do printf '%-12s %-14s %d\n' "${names[i]}" "${states[i]}" "${times[i]}"; done
printf 'logs and figures: %s, %d s in all\n' "$out" "$SECONDS"
if [ "$stopped" = TERM ]; then exit 143; elif [ "$stopped" = INT ]; then exit 130; fi
for i in "${!states[@]}"; do
  case ${names[i]}:${states[i]} in
    *:passed | *:"not run" | libraries:*) ;;
    *) exit 1 ;;
  esac
done
