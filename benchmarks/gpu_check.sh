#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes, without network:
#
#     bash benchmarks/gpu_check.sh
#
# Builds the libraries for this machine's GPU, runs the tests that need one, compute-sanitizer on some of them, and the
# benchmarks. Each stage has its own time, and a later one does not stop an earlier one's results: they are written to OUT
# (benchmarks/out/gpu unless set), in few files, the output of all stages to log.txt. Ends in a short table; the exit
# status is 1 if a stage failed.
#
# Needs Python with torch, a CUDA build of it, with pytest and hypothesis, cmake, ninja, pybind11, setuptools and nvcc.
# PYTHON names another interpreter than python3, LIMIT seconds of each stage instead of its own. torchdeq, and optimistix
# on JAX, are compared where they can be imported.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-$PWD/benchmarks/out/gpu}
mkdir -p "$out"
: > "$out/log.txt"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYDEQ_REQUIRE_KERNELS=1
unset PYDEQ_KERNELS PYDEQ_ISA PYDEQ_SANITIZE PYDEQ_WITH_KERNELS
names=() states=() times=()

# stage NAME SECONDS COMMAND...: runs it, its output to OUT/log.txt and, the end of it, here.
stage() {
  local name=$1 limit=${LIMIT:-$2} begin=$SECONDS status
  shift 2
  printf '\n=== %s (at most %d s)\n' "$name" "$limit" | tee -a "$out/log.txt"
  timeout --kill-after=10 "$limit" bash -c '"$@"' stage "$@" > "$out/running.log" 2>&1
  status=$?
  tail -n "${lines:-15}" "$out/running.log"
  cat "$out/running.log" >> "$out/log.txt"
  rm "$out/running.log"
  case $status in
    0) record "$name" passed $((SECONDS - begin)) ;;
    77) record "$name" "not run" $((SECONDS - begin)) ;;
    124 | 137) record "$name" "out of time" $((SECONDS - begin)) ;;
    *) record "$name" "failed ($status)" $((SECONDS - begin)) ;;
  esac
}

record() {
  names+=("$1") states+=("$2") times+=("$3")
  printf -- '--- %s: %s, %d s\n' "$1" "$2" "$3"
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
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv || return
  nvcc --version | tail -n 2
  git rev-parse HEAD 2> /dev/null
  "$python" -c 'import sys, torch; print(sys.version.split()[0], torch.__version__, torch.cuda.get_device_name())'
}

build() {
  PYDEQ_WITH_CUDA=1 "$python" setup.py --quiet build_ext --inplace || return
  "$python" -m pydeq info || return
  "$python" -c 'import sys, pydeq; k = pydeq.kernels(); sys.exit(0 if k.cuda else k.cuda_reason)'
}

tests() {
  local workers=()
  if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n 6); fi
  # The package is not installed here, so what its metadata says is not asked for.
  "$python" -m pytest -q -p no:cacheprovider -o addopts="--strict-markers --strict-config -ra" \
    -p no:benchmark -W default --junitxml="$out/tests.xml" "${workers[@]}" tests/cuda
}

sanitizers() {
  local tool=$1 filter choice status
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
    "$python" -m pytest -q -x -p no:cacheprovider -p no:benchmark -W default \
    -o addopts="--strict-markers" -m sanitize tests/cuda
  status=$?
  # A machine may forbid it: what then fails is the first allocation.
  if [ $status != 0 ] && grep -qi "device not supported\|not supported on this" "$out/running.log"; then return 77; fi
  return $status
}

export python out
export -f machine build tests sanitizers
stage machine 20 machine
stage build 100 build
if [ "${states[-1]}" = passed ]; then
  stage tests 140 tests
  for tool in memcheck racecheck synccheck; do stage "$tool" 40 sanitizers "$tool"; done
  lines=200 stage benchmarks 140 "$python" -m benchmarks.device --out "$out" --seconds 110
fi

printf '\n%-12s %-14s %s\n' stage result seconds
for i in "${!names[@]}"; do printf '%-12s %-14s %d\n' "${names[i]}" "${states[i]}" "${times[i]}"; done
printf 'logs and figures: %s\n' "$out"
for state in "${states[@]}"; do
  case $state in passed | "not run") ;; *) exit 1 ;; esac
done
