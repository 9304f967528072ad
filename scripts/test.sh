#!/usr/bin/env bash
# test.sh - sets this machine up, builds, and runs every test. Ends with ctest's summary.
#
#   scripts/test.sh                  everything
#   SLUICE_SANITIZERS=0 ...          without the sanitizer builds; =cpu-tsan: with that preset alone
#   SLUICE_TORCH=0 ...               without PyTorch and transformers, and the tests that need them
#   SLUICE_ENGINES=0 ...             without fetching SGLang and vLLM, whose own code some tests run
#   SLUICE_MINUTES=n ...             cuts the wheel's tests and the sanitizers off n minutes after the
#                                    start, and says so
#   SLUICE_JOBS=n ...                jobs at a time; default: one for each core
#
# In order: all tests of the release build, among them the checks of the tree (layering, format, links);
# the self-contained wheel, installed and tested beside PyTorch and transformers, without which the
# release build's tests have run the package; the tests under ASan + UBSan; those with threads under
# TSan. The CUDA parts are built where there is an nvcc; their tests report themselves skipped where
# there is no GPU. Tests with MPI run as processes of this machine; one of them makes network namespaces
# if it may. The sanitizers stand last, so that a slow machine with a limit of time loses those first.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
sluice_setup all

jobs=${SLUICE_JOBS:-$(nproc)}
started=$SECONDS
minutes() { printf '%d:%02d' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }

# PyTorch and the engines' wheels are fetched while the release build is made.
with_torch=${SLUICE_TORCH:-1}
if [ "$with_torch" != 0 ]; then
  timeout 1500 bash -c 'set -euo pipefail; source scripts/setup.sh; sluice_torch_venv' \
    >build/torch-venv.log 2>&1 &
  torch_job=$!
fi
with_engines=${SLUICE_ENGINES:-1}
[ "$with_torch" != 0 ] || with_engines=0
if [ "$with_engines" != 0 ]; then
  timeout 1200 bash -c 'set -euo pipefail; source scripts/setup.sh; sluice_engines' \
    >build/engines.log 2>&1 &
  engines_job=$!
fi
# A note, and the tests of the engine are left out, where it could not be fetched.
wait_for_engines() {
  [ "$with_engines" != 0 ] || return 0
  say "wait for SGLang's and vLLM's Python files ($(minutes))"
  wait "$engines_job" || { cat build/engines.log; printf 'note: not every engine could be fetched in time\n'; }
}
wait_for_torch() {
  [ "$with_torch" != 0 ] || return 0
  say "wait for PyTorch ($(minutes))"
  wait "$torch_job" && return
  with_torch=0
  cat build/torch-venv.log
  printf 'note: no PyTorch or transformers; the tests that need them are left out\n'
}

# $1: preset; the rest: options for cmake
build() {
  local preset=$1
  say "build $preset ($(minutes))"
  cmake --preset "$@"
  cmake --build --preset "$preset" -j "$jobs"
}

# The wheel as users get it, self-contained, but for the CUDA backend: its minutes of compiling would
# prove nothing that the module of the release build, which has it, has not been through already. The
# flags are those of the release build, and nanobind is the same copy: pip would fetch another into a
# folder with a new name. So its objects come from ccache.
test_wheel() {
  local venv=build/torch-venv wheels=build/wheels
  say "test the wheel ($(minutes))"
  if [ "$with_torch" = 0 ]; then
    venv=build/wheel-venv
    build/test-venv/bin/python -m venv --clear "$venv"  # An interpreter with headers.
  fi
  rm -rf "$wheels"
  CMAKE_BUILD_PARALLEL_LEVEL=$jobs scripts/build_wheel.sh --python "$venv/bin/python" --no-cuda \
    --out "$wheels" -D CMAKE_CXX_COMPILER=c++ -D SLUICE_WERROR=ON \
    -D nanobind_ROOT="$(build/test-venv/bin/python -m nanobind --cmake_dir)"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check --force-reinstall --no-deps "$wheels"/*.whl
  "$venv/bin/python" -m pip install -q --disable-pip-version-check "$(ls "$wheels"/*.whl)[test]" ./python/deep_ep_shim
  "$venv/bin/python" tests/package/one_layer.py
  # Two at a time: the tests of models and engines, which mostly import and compile in one thread, and the others.
  local part models=() others=() left status=0 models_status=0
  for part in transformers transformers_generate transformers_mxfp4 sglang vllm torch_ops; do
    models+=("tests/python/test_$part.py") others+=("--ignore=tests/python/test_$part.py")
  done
  local -x SLUICE_COMMAND=$PWD/build/ci/cli/sluice SLUICE_SELF_CONTAINED=1
  left=$(seconds_left)
  # Without PyTorch every test of a model or engine skips itself, and pytest calls no test at all a failure.
  if [ "$with_torch" != 0 ]; then
    timeout "$left" "$venv/bin/python" -m pytest -q -p no:cacheprovider --durations=8 "${models[@]}" \
      >build/models-tests.log 2>&1 &
  else
    printf 'note: the tests of models and engines are left out: no PyTorch\n' >build/models-tests.log &
  fi
  local job=$!
  timeout "$left" "$venv/bin/python" -m pytest -q -p no:cacheprovider --durations=8 "${others[@]}" || status=$?
  wait "$job" || models_status=$?
  cat build/models-tests.log
  unless_cut_off "the wheel's tests" "$status" || return
  unless_cut_off "the wheel's tests of models and engines" "$models_status"
}

# Seconds until SLUICE_MINUTES are over, at least 1; 0, which is no limit, without SLUICE_MINUTES.
seconds_left() {
  [ -n "${SLUICE_MINUTES:-}" ] || { echo 0; return; }
  local left=$((SLUICE_MINUTES * 60 - (SECONDS - started)))
  echo $((left > 1 ? left : 1))
}

# $1: what; $2: its exit status, which is passed on. What was cut off is no failure, and named.
unless_cut_off() {
  [ "$2" = 124 ] || return "$2"
  printf 'note: %s: cut off after %s minutes; what was left is not tested\n' "$1" "$SLUICE_MINUTES"
}

# $1: preset
test_sanitized() {
  local preset=$1 status=0
  say "build $preset ($(minutes))"
  cmake --preset "$preset"
  timeout "$(seconds_left)" cmake --build --preset "$preset" -j "$jobs" || status=$?
  if [ "$status" = 0 ]; then
    say "test $preset ($(minutes))"
    timeout "$(seconds_left)" ctest --preset "$preset" -j "$jobs" || status=$?
  fi
  unless_cut_off "$preset" "$status"
}

# The release build is configured before PyTorch has come, which brings the one header of NCCL there is here.
compile_nccl() {
  local header toolkit
  header=$(find build/torch-venv -path '*/nvidia/nccl/include/nccl.h' -print -quit 2>/dev/null) || true
  toolkit=$(dirname "$(dirname "$(command -v nvcc || echo /none/none)")")/include
  if [ -z "$header" ] || [ ! -e "$toolkit/cuda_runtime_api.h" ]; then
    printf 'note: src/transport/nccl_library.cc is not compiled: no header of NCCL or CUDA\n'
    return
  fi
  say "compile src/transport/nccl_library.cc with NCCL's header ($(minutes))"
  c++ -std=c++20 -Wall -Wextra -Wshadow -Werror -fsyntax-only -Iinclude -Isrc -isystem "$toolkit" \
    -isystem "$(dirname "$header")" src/transport/nccl_library.cc
}

with_python=ON
build/test-venv/bin/python -c 'import nanobind' 2>/dev/null || with_python=OFF
build ci -DSLUICE_PYTHON=$with_python
wait_for_torch
wait_for_engines
if [ "$with_torch" != 0 ]; then
  cmake --preset ci -DSLUICE_TEST_PYTHON="$PWD/build/torch-venv/bin/python" >/dev/null
fi
compile_nccl
say "test ci ($(minutes))"
ctest --preset ci -j "$jobs"

if [ $with_python = ON ]; then
  test_wheel
else
  say "not tested: the Python package, as its build tools could not be installed"
fi

sanitizers=${SLUICE_SANITIZERS:-cpu-asan cpu-tsan}
[ "$sanitizers" != 0 ] || sanitizers=
for preset in $sanitizers; do
  test_sanitized "$preset"
done
say "done ($(minutes))"
if command -v ccache >/dev/null; then { ccache --show-stats || true; } | sed -n 1,4p; fi
