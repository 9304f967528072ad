#!/usr/bin/env bash
# bench_multi_gpu.sh - the exchange and the whole DeepSeek-R1 layer over the GPUs of this host:
# first every element, then times. About ten minutes; needs no network and installs nothing.
#
#   scripts/bench_multi_gpu.sh [BUILD_DIR] [OUT_DIR]
#
# BUILD_DIR (build/cuda) holds what `cmake --preset cuda && cmake --build --preset cuda` and
# `cmake --build --preset cuda --target bench_nccl` made; a folder with copies of the programs
# does as well. OUT_DIR (out/multi_gpu) gets a log and one JSON file for each table.
# With one GPU the ranks share it, and there is no NCCL baseline and no link to measure.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cuda} out=${2:-out/multi_gpu}
export CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER NCCL_NVLS_ENABLE=0
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
find_program() {
  local found
  found=$(find "$build" -name "$1" -type f -perm -u+x -print -quit)
  [ -n "$found" ] || { printf 'error: no %s under %s\n' "$1" "$build" >&2; return 1; }
  printf '%s\n' "$found"
}
sluice=$(find_program sluice)
check=$(find_program test_cuda_exchange)
nccl=$(find_program bench_nccl || true)
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)
date -u '+%F %T UTC'
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c
git log -1 --format='commit %h' 2>/dev/null || true

say "every element: ranks spread over $gpus GPU(s), both modes, all formats on the wire"
"$check" --gtest_brief=1 --gtest_filter='*AnyNumberOfRanks:*FewRanks*:*NoTokens*:*Capacity*'
say "a thousand rounds of 1, 17 and 128 tokens on 8 ranks, fresh routing each, every element"
"$check" --gtest_brief=1 --gtest_filter='*AThousandRounds/0:*AThousandRounds/1:*AThousandRounds/2'

checkpoint=$(mktemp -d)
trap 'rm -rf "$checkpoint"' EXIT
"$sluice" make-checkpoint --preset r1-slice --out "$checkpoint/slice" | tail -n 1
say "every recipe, verified against float64"
for recipe in direct direct-bf16 bf16-static requant-static static pow2-static; do
  mode=low-latency
  "$sluice" run --checkpoint "$checkpoint/slice" --backend cuda --ranks 8 --tokens 64 --mode $mode \
    --recipe $recipe --repeat 3 | grep -E '^(recipe|verified|outputs)'
done
"$sluice" run --checkpoint "$checkpoint/slice" --backend cuda --ranks 8 --tokens 64 --repeat 3 --prove |
  grep -E '^identity'

# Ranks: as many as GPUs, which is what the figures are about; on one GPU, 8 that share it.
rank_counts=()
for ranks in 2 4 8; do [ "$ranks" -le "$gpus" ] && rank_counts+=("$ranks"); done
[ ${#rank_counts[@]} -gt 0 ] || rank_counts=(8)
for ranks in "${rank_counts[@]}"; do
  say "dispatch and combine, $ranks ranks: low-latency, then normal"
  "$sluice" --json "$out/exchange-low-latency-$ranks.json" bench exchange --backend cuda \
    --ranks "$ranks" --tokens 1,16,64,128,256,1024 --repeat 20
  "$sluice" --json "$out/exchange-normal-$ranks.json" bench exchange --backend cuda \
    --ranks "$ranks" --mode normal --tokens 1024,4096 --pairs 4 --no-all-gather
  if [ -n "$nccl" ] && [ "$gpus" -ge "$ranks" ]; then
    say "all-gather and reduce-scatter through NCCL, $ranks GPUs"
    "$nccl" --devices "$ranks" --json "$out/nccl-$ranks.json"
  fi
done

say "the whole DeepSeek-R1 layer, 256 experts"
"$sluice" make-checkpoint --preset r1-layer --out "$checkpoint/layer" | tail -n 1
for ranks in "${rank_counts[@]}"; do
  for tokens in 1 32 128; do
    "$sluice" --json "$out/layer-$ranks-$tokens.json" run --checkpoint "$checkpoint/layer" \
      --backend cuda --ranks "$ranks" --tokens $tokens --repeat 20 | grep -E '^(ranks|slowest|experts|verified)'
  done
done
say "done; tables in $out"
