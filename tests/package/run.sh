#!/bin/sh
# run.sh BUILD CXX - installs Sluice from its build folder, builds its users against it, runs them.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
prefix=$1/package_test
rm -rf "$prefix"
cmake --install "$1" --component Unspecified --prefix "$prefix/installed" >/dev/null
for header in $(cd "$prefix/installed/include" && find sluice -name '*.h'); do
  grep -qF "\"$header\"" "$here/consumer.cc" || { echo "consumer.cc does not include $header"; exit 1; }
done
cmake -S "$here" -B "$prefix/build" -G Ninja -DCMAKE_CXX_COMPILER="$2" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$prefix/installed" >/dev/null
cmake --build "$prefix/build"
"$prefix/build/server"
"$prefix/build/consumer"
