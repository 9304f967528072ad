#!/usr/bin/env bash
# check_wheel.sh - installs a wheel by pip into a bare root of another Debian release, which has Python
# and its venv and nothing else of use; runs an expert layer there and looks up the plug-ins as
# engines do. Needs root and debootstrap; takes two minutes.
#
#   scripts/check_wheel.sh WHEEL [RELEASE]
#
#   WHEEL     a file that build_wheel.sh made, for the Python of that release
#   RELEASE   default: trixie, with Python 3.13
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
[ $# -ge 1 ] && [ -f "$1" ] || die "usage: scripts/check_wheel.sh WHEEL [RELEASE]"
[ "$(id -u)" -eq 0 ] || die "a bare root is made and entered by root alone"
command -v debootstrap >/dev/null || die "debootstrap is not installed"

wheel=$1 release=${2:-trixie} root=build/bare-$(basename "${2:-trixie}")
if [ ! -e "$root/.complete.venv" ]; then
  say "making a bare root of $release"
  # The archive that this machine's own packages come from.
  mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    sed -n -e 's/^URIs: *//p' -e 's/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' | head -n 1) || true
  [ -n "$mirror" ] || die "no archive of packages in /etc/apt"
  mkdir -p build
  rm -rf "$root"
  debootstrap --variant=minbase --include=python3,python3-venv "$release" "$root" "$mirror" >build/bare-root.log 2>&1 ||
    { tail -n 20 build/bare-root.log; die "no bare root of $release"; }
  touch "$root/.complete.venv"
fi
version=$(chroot "$root" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
rm -rf "$root/opt/wheels" && mkdir -p "$root/opt/wheels"
cp "$wheel" "$root/opt/wheels/"
sluice_test_venv
build/test-venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$version" -d "$root/opt/wheels" numpy ml_dtypes

say "$(basename "$wheel") with Python $version of $release"
cp tests/package/one_layer.py "$root/opt/wheels/"
chroot "$root" sh -eu -c '
  cd /opt/wheels
  python3 -m venv --clear /opt/env
  /opt/env/bin/python -m pip install -q --disable-pip-version-check --no-index --find-links . sluice ml_dtypes
  /opt/env/bin/python one_layer.py'
