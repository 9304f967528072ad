#!/usr/bin/env bash
# setup.sh - installs what the build needs and this machine lacks. Debian 12 and its relatives.
#
#   scripts/setup.sh          everything: building, testing, benchmarks
#   scripts/setup.sh build    only what the library and the command line need
#
# Also sourced by the other scripts for its functions.

sluice_packages_build=(cmake ninja-build ccache g++ git libhwy-dev libcli11-dev libfmt-dev
  nlohmann-json3-dev)
sluice_packages_test=(python3 python3-dev python3-venv libgtest-dev libgmock-dev librapidcheck-dev libbenchmark-dev
  openmpi-bin libopenmpi-dev iproute2 chromium fonts-dejavu-core)

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "not root and no sudo; as root, run: $*"
  fi
}

# Packages of the given list that dpkg does not call installed.
missing_packages() {
  local package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
      printf '%s\n' "$package"
  done
}

# $1: build or all.
sluice_setup() {
  local wanted=("${sluice_packages_build[@]}") missing
  [ "$1" = build ] || wanted+=("${sluice_packages_test[@]}")
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    die "this is not a Debian-like system; install these, by whatever names they have here,
and use the CMake presets directly (cmake --preset cpu): ${wanted[*]}"
  fi
  # shellcheck disable=SC2207  # Names of packages have no spaces; works without /proc, too.
  missing=($(missing_packages "${wanted[@]}"))
  if [ "${#missing[@]}" -gt 0 ]; then
    say "installing ${missing[*]}"
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
      "${missing[@]}"
  fi
  sluice_check_tools
  [ "$1" = build ] || sluice_test_venv
}

# Python packages: those that define file formats, for the tests that read and write through them,
# and what the bindings are built and tested with (pyproject.toml has the same bounds). What needs
# them is left out, and says so, where they cannot be had.
sluice_test_venv() {
  local venv=build/test-venv python=python3
  "$venv/bin/python" -c 'import numpy, safetensors, nanobind, ml_dtypes, pytest' 2>/dev/null && return
  # An interpreter without its headers can build nothing; the system's has them by now.
  "$python" -c 'import os, sysconfig
raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    python=/usr/bin/python3
  say "installing Python packages for tests into $venv"
  if ! { "$python" -m venv --clear "$venv" &&
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --retries 1 \
      'safetensors>=0.4,<1' 'numpy>=1.26,<3' 'nanobind>=3.1,<3.2' 'ml_dtypes>=0.4' 'pytest>=7'; }; then
    printf 'note: no Python packages; what needs them is left out: bindings and their tests\n'
  fi
}

# What the tests with tensors and whole models need, in an environment of its own: the one above
# shows that the package works without. The package index has no PyTorch for CPUs alone, and the one
# it has does not load without the CUDA libraries that it brings (libtorch_cuda.so needs each): 3 GB
# to fetch, 5.6 GB on disk, 2 to 3 minutes of one core. So scripts/test.sh does this while it builds.
# The versions are those that the tests were run with.
sluice_torch_venv() {
  local venv=build/torch-venv
  "$venv/bin/python" -c 'import torch, transformers, accelerate, compressed_tensors, ml_dtypes, pytest' 2>/dev/null && return
  build/test-venv/bin/python -m venv --clear "$venv" &&
    "$venv/bin/python" -m pip install -q --disable-pip-version-check \
      'torch==2.15.*' 'transformers==5.24.*' 'accelerate==1.15.*' 'compressed-tensors==0.20.*' \
      'safetensors>=0.4,<1' 'numpy>=1.26,<3' 'ml_dtypes>=0.4' 'pytest>=7'
}

# $1: folder of an engine. What of its dependencies cannot be stubbed goes beside its files: both engines
# derive classes from msgspec's with options in the class statement.
sluice_engine_needs() {
  build/test-venv/bin/python -m pip install -q --disable-pip-version-check --no-deps \
    --only-binary :all: --target "$1" 'msgspec>=0.20,<1'
}

# The files of the inference engines that the package plugs into, for tests that run the engines' own code:
# into build/engines/NAME, from their wheels (sglang 39 MB, vllm 350 MB), without compiled libraries, which
# are most of them, and without what they depend on. Each wheel is removed when its files are out. The
# versions are those that the tests were written for; where an engine has moved, the tests say which name
# is gone. $@: engines; default: all.
sluice_engine_versions=('sglang==0.5.23' 'vllm==0.33.0')
sluice_engines() {
  local wanted name target failed=0
  for wanted in "${sluice_engine_versions[@]}"; do
    name=${wanted%%==*} target=build/engines/${wanted%%==*}
    [ $# -eq 0 ] || [[ " $* " = *" $name "* ]] || continue
    [ ! -d "$target/$name-${wanted#*==}.dist-info" ] || continue
    rm -rf "$target" "$target.wheel"
    if build/test-venv/bin/python -m pip download -q --disable-pip-version-check --no-deps \
      --only-binary :all: -d "$target.wheel" "$wanted" &&
      build/test-venv/bin/python scripts/unpack_engine.py "$target.wheel"/*.whl "$target" &&
      sluice_engine_needs "$target"; then
      printf '%s: its Python files are in %s\n' "$wanted" "$target"
    else
      printf 'note: no %s; the tests that run its own code are left out\n' "$wanted"
      failed=1
      rm -rf "$target"
    fi
    rm -rf "$target.wheel"
  done
  return $failed
}

sluice_check_tools() {
  local version
  version=$(cmake --version | sed -n 's/^cmake version //p')
  [ "$(printf '3.25\n%s\n' "$version" | sort -V | head -n 1)" = 3.25 ] ||
    die "cmake $version is too old: 3.25 is needed ($(command -v cmake))"
  # A CUDA toolkit is used where there is one, also off the PATH.
  if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
    PATH=$PATH:/usr/local/cuda/bin
  fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  cd "$(dirname "$0")/.."
  sluice_setup "${1:-all}"
fi
