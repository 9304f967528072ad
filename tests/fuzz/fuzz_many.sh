#!/usr/bin/env bash
# fuzz_many.sh - fuzzes what reads config.json, hf_quant_config.json and the index, on every core.
#
#   tests/fuzz/fuzz_many.sh [RUNS] [SANITIZED_RUNS] [SEED] [JOBS]
#
# Builds with the default compiler in build-fuzz, or where SLUICE_FUZZ_BUILD says; then runs RUNS
# (10 million) random programs, and SANITIZED_RUNS (1 million) others under AddressSanitizer,
# UndefinedBehaviorSanitizer and leak detection. Exits with 0 if nothing was found. What fails is
# shown with the command that repeats it alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:-10000000} sanitized_runs=${2:-1000000} seed=${3:-1} jobs=${4:-$(nproc)}
build=${SLUICE_FUZZ_BUILD:-build-fuzz}

cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSLUICE_FUZZ=ON -DSLUICE_CUDA=OFF \
  -DSLUICE_BENCH=OFF >"$build.configure.log" || { cat "$build.configure.log"; exit 1; }
cmake --build "$build" -j "$jobs" --target fuzz_config_programs fuzz_config_programs_asan

status=0
"$build/tests/fuzz/fuzz_config_programs" -runs="$runs" -seed="$seed" -jobs="$jobs" || status=1
ASAN_OPTIONS=detect_leaks=1 "$build/tests/fuzz/fuzz_config_programs_asan" -runs="$sanitized_runs" \
  -seed="$((seed + 1))" -jobs="$jobs" || status=1
exit "$status"
