#!/usr/bin/env bash
# test.sh - sets this machine up, builds, and runs every test. Ends with ctest's summary.
#
#   scripts/test.sh                  everything
#   SLUICE_SANITIZERS=0 ...          without the sanitizer builds
#   SLUICE_JOBS=n ...                jobs at a time; default: one for each core
#
# In order: the tests under ASan + UBSan, those with threads under TSan, then all tests of the
# release build, among them the checks of the tree (layering, format, links). The CUDA parts are
# built where there is an nvcc; their tests report themselves skipped where there is no GPU. Tests
# with MPI run as processes of this machine; one of them makes network namespaces if it may. Last,
# the Python package is installed into a virtual environment of its own and tested from there.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
sluice_setup all

jobs=${SLUICE_JOBS:-$(nproc)}
started=$SECONDS
minutes() { printf '%d:%02d' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }

# $1: preset; the rest: options for cmake
build() {
  local preset=$1
  say "build $preset ($(minutes))"
  cmake --preset "$@"
  cmake --build --preset "$preset" -j "$jobs"
}

# `pip install .` as users do it, but for the CUDA backend: its minutes of compiling would prove
# nothing that the module of the release build, which has it, has not been through already. The flags
# are those of the release build, so that its objects come from ccache.
test_wheel() {
  local venv=build/wheel-venv
  say "test pip install ($(minutes))"
  build/test-venv/bin/python -m venv --clear "$venv"  # An interpreter with headers.
  CMAKE_BUILD_PARALLEL_LEVEL=$jobs "$venv/bin/python" -m pip install -q --disable-pip-version-check \
    --config-settings=cmake.define.SLUICE_CUDA=OFF \
    --config-settings=cmake.define.CMAKE_CXX_COMPILER=c++ \
    --config-settings=cmake.define.SLUICE_WERROR=ON '.[test]'
  "$venv/bin/python" -m pip install -q --disable-pip-version-check ./python/deep_ep_shim
  SLUICE_COMMAND=$PWD/build/ci/cli/sluice "$venv/bin/python" -m pytest -q -p no:cacheprovider
}

if [ "${SLUICE_SANITIZERS:-1}" != 0 ]; then
  for preset in cpu-asan cpu-tsan; do
    build $preset
    say "test $preset ($(minutes))"
    ctest --preset $preset -j "$jobs"
  done
fi

with_python=ON
build/test-venv/bin/python -c 'import nanobind' 2>/dev/null || with_python=OFF
build ci -DSLUICE_PYTHON=$with_python
say "test ci ($(minutes))"
ctest --preset ci -j "$jobs"

if [ $with_python = ON ]; then
  test_wheel
else
  say "not tested: the Python package, as its build tools could not be installed"
fi
say "done ($(minutes))"
if command -v ccache >/dev/null; then { ccache --show-stats || true; } | sed -n 1,4p; fi
