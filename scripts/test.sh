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
# with MPI run as processes of this machine; one of them makes network namespaces if it may.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
sluice_setup all

jobs=${SLUICE_JOBS:-$(nproc)}
started=$SECONDS
minutes() { printf '%d:%02d' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }

# $1: preset
build() {
  say "build $1 ($(minutes))"
  cmake --preset "$1"
  cmake --build --preset "$1" -j "$jobs"
}

if [ "${SLUICE_SANITIZERS:-1}" != 0 ]; then
  for preset in cpu-asan cpu-tsan; do
    build $preset
    say "test $preset ($(minutes))"
    ctest --preset $preset -j "$jobs"
  done
fi

build ci
say "test ci ($(minutes))"
ctest --preset ci -j "$jobs"
