#!/usr/bin/env bash
# demo.sh - sets this machine up, builds, and runs one DeepSeek-R1-sized MoE layer over four ranks.
#
#   scripts/demo.sh [--tokens N] [--ranks N]
#   SLUICE_DEMO_DIR=DIR ...    where the 0.75 GB checkpoint is kept; default: build/demo
#
# Makes a synthetic checkpoint with the shapes of DeepSeek-R1 (32 of its 256 experts), then runs
# both modes with three recipes, each verified row by row against a float64 reference. Fails if
# any of them does.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

tokens=16 ranks=4
while [ $# -gt 0 ]; do
  case $1 in
    --tokens) tokens=$2 && shift 2 ;;
    --ranks) ranks=$2 && shift 2 ;;
    *) die "unknown option $1; see the top of $0" ;;
  esac
done

sluice_setup build
started=$SECONDS
dir=${SLUICE_DEMO_DIR:-build/demo}
mkdir -p "$dir"

say "building the command line"
cmake -S . -B build/demo-cli -G Ninja -DCMAKE_BUILD_TYPE=Release -DSLUICE_CUDA=OFF \
  -DSLUICE_TESTS=OFF -DSLUICE_BENCH=OFF >"$dir/configure.log" || { cat "$dir/configure.log"; exit 1; }
cmake --build build/demo-cli --target sluice_cli
sluice=build/demo-cli/cli/sluice

checkpoint=$dir/r1-slice
# A checkpoint that was being written when somebody pressed ^C does not count.
if [ ! -e "$checkpoint/.complete" ]; then
  say "making a checkpoint: r1-slice, about 0.75 GB"
  rm -rf "$checkpoint"
  "$sluice" make-checkpoint --preset r1-slice --out "$checkpoint"
  touch "$checkpoint/.complete"
fi

say "what is in it"
"$sluice" inspect "$checkpoint"

row() { printf '%-16s %-12s %10s %12s %12s %14s  %s\n' "$@"; }
table=$(row recipe mode "layer ms" "sent MB" "weights GB/s" "error/bound" verified)
for mode in low-latency normal; do
  for recipe in direct bf16-static requant-static; do
    say "$recipe, $mode mode, $ranks ranks, $tokens tokens each"
    report=$dir/$recipe-$mode.json
    prove=
    # Only recipes that round once have a twin that must give GEMM1 the same bytes.
    [ $recipe = requant-static ] || prove=--prove
    "$sluice" run --checkpoint "$checkpoint" --layer 3 --ranks "$ranks" --tokens "$tokens" \
      --mode $mode --recipe $recipe --repeat 3 --verify 4 $prove --json "$report"
    field() { sed -n "s/^ *\"$1\": \([^,]*\),\{0,1\}\$/\1/p" "$report" | head -n 1; }
    table+=$'\n'$(row $recipe $mode \
      "$(awk "BEGIN { printf \"%.1f\", $(field total_us) / 1000 }")" \
      "$(awk "BEGIN { printf \"%.2f\", $(field wire_bytes_off_rank) / 1e6 }")" \
      "$(awk "BEGIN { printf \"%.1f\", $(field experts_gbytes_per_s) }")" \
      "$(awk "BEGIN { printf \"%.3f\", $(field worst_ratio) }")" "$(field passed)")
  done
done

say "one layer, $ranks ranks x $tokens tokens ($((SECONDS - started)) s after the packages)"
printf '%s\n' "$table"
