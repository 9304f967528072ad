#!/bin/sh
# check_format.sh - clang-format over every source file; changes nothing. Exit 77 = not checked.
# `--fix` rewrites the files instead.
cd "$(dirname "$0")/.." || exit 1
format=
for name in clang-format-14 clang-format; do
  if command -v "$name" >/dev/null; then format=$name && break; fi
done
if [ -z "$format" ]; then
  echo "skipped: clang-format is not installed"
  exit 77
fi
# Releases differ in what they do to the same file; the tree is formatted with this one.
case $("$format" --version) in
  *"version 14."*) ;;
  *) echo "skipped: $("$format" --version) is not release 14" && exit 77 ;;
esac
sources=$(mktemp) && trap 'rm -f "$sources"' EXIT
find include src lab cli tests python -type f \
  \( -name '*.h' -o -name '*.cc' -o -name '*.cuh' -o -name '*.cu' \) 2>/dev/null >"$sources"
mode="--dry-run --Werror"
[ "${1:-}" = --fix ] && mode=-i
# shellcheck disable=SC2086
xargs "$format" $mode <"$sources"
status=$?
echo "$(wc -l <"$sources") files, $format: $([ $status -eq 0 ] && echo clean || echo 'run tools/check_format.sh --fix')"
exit $status
