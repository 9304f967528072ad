#!/usr/bin/env bash
# bench_multi_gpu.sh - the exchange and the whole DeepSeek-R1 layer over the GPUs of this host, ranks
# as streams of one process and as one process for each GPU: first every element, then times. Needs
# no network and installs nothing.
#
#   scripts/bench_multi_gpu.sh [BUILD_DIR [OUT_DIR [PART ...]]]
#
# BUILD_DIR (build/cuda) holds what `cmake --preset cuda && cmake --build --preset cuda` and
# `cmake --build --preset cuda --target cuda_benches cuda_planted_faults` made; a folder with copies
# of the programs does as well. OUT_DIR (out/multi_gpu) gets a log and one JSON file for each table.
# PART, by default all of them:
#
#   check     every element, streams and processes, both modes, all formats; a thousand rounds
#   faults    planted faults are noticed; a rank that is killed or stopped is named
#   recipes   every recipe against float64, the identity proof over processes
#   link      what copies, loads and stores of kernels get from the link; NCCL's collectives
#   streams   dispatch, combine and pairs, ranks as streams: hidden 7168, 6144 and 3584
#   processes the same, one process for each rank
#   layer     the whole layer, 256 experts, beside its parts and stage by stage, streams and processes
#
# With one GPU the ranks share it, and there is no NCCL baseline and no link to measure.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cuda} out=${2:-out/multi_gpu}
shift $(($# < 2 ? $# : 2))
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(check faults recipes link streams processes layer)
export CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER NCCL_NVLS_ENABLE=0
mkdir -p "$out"
exec > >(tee -a "$out/log.txt") 2>&1

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
find_program() {
  local found
  found=$(find "$build" -name "$1" -type f -perm -u+x -print -quit)
  [ -n "$found" ] || { printf 'error: no %s under %s\n' "$1" "$build" >&2; return 1; }
  printf '%s\n' "$found"
}
sluice=$(find_program sluice)
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)
# Ranks: as many as GPUs, which is what the figures are about; on one GPU, 8 that share it.
rank_counts=()
for ranks in 2 4 8; do [ "$ranks" -le "$gpus" ] && rank_counts+=("$ranks"); done
[ ${#rank_counts[@]} -gt 0 ] || rank_counts=(8)
# Processes of one GPU take turns of milliseconds, so there are few of them.
process_counts=("${rank_counts[@]}")
[ "$gpus" -gt 1 ] || process_counts=(2)
most=${process_counts[-1]}
checkpoints=$(mktemp -d)
trap 'rm -rf "$checkpoints"' EXIT

# run_tests PROGRAM ARGUMENT...: prints how many tests passed, or all that a failed run said.
run_tests() {
  local text
  text=$("$@" --gtest_brief=1 2>&1) || { printf '%s\n' "$text"; return 1; }
  grep -E '^\[=+\] .* ran|PASSED' <<<"$text" | paste -sd ' '
}

check() {
  local check rounds layers n
  check=$(find_program test_cuda_exchange) rounds=$(find_program test_cuda_rounds)
  layers=$(find_program test_cuda_layer_ranks)
  say "layers of 2, 4 and 8 ranks against one rank that has all experts, streams and $most processes"
  run_tests "$layers"
  run_tests "$layers" --transport ipc --processes "$most"
  say "every element: ranks as streams over $gpus GPU(s), both modes, all formats on the wire"
  run_tests "$check"
  run_tests "$rounds" --gtest_filter='*FewRanks*'
  say "ranks that dispatch for different layers name each other, streams and 3 processes"
  run_tests "$(find_program test_cuda_different_calls)"
  run_tests "$(find_program test_cuda_different_calls)" --transport ipc --processes 3 --gtest_filter='*DifferentLayers*'
  say "a thousand rounds of up to 1, 17, 128 and 1024 tokens: 8 ranks, then one for each GPU"
  run_tests "$rounds" --gtest_filter='*RepeatTest*/0:*RepeatTest*/1:*RepeatTest*/2:*DeviceRanks*'
  for n in "${process_counts[@]}"; do
    say "the same, $n processes"
    run_tests "$rounds" --transport ipc --processes "$n" --gtest_filter='*DeviceRanks*'
    run_tests "$check" --transport ipc --processes "$n" --gtest_filter='*Capacity*:*Index*:*Counters*'
  done
}

# Runs the rounds of a build with a fault, in which elements must differ: a crash or a timeout alone
# does not count. True: they did.
run_fault() {
  local fault=$1 size=$2 program text
  shift 2
  program=$(find_program "test_cuda_rounds_fault_$fault")
  printf 'fault %s, size %s %s: ' "$fault" "$size" "$*"
  if text=$("$program" "$@" --gtest_filter="*DeviceRanks*/$size" 2>&1); then
    printf 'not noticed in 2000 rounds\n'
    return 1
  fi
  grep -oE -m 1 'rank [0-9]+: [0-9]+ elements differ.*' <<<"$text" || { tail -n 5 <<<"$text"; return 1; }
  grep -oE -m 1 'round [0-9]+$' <<<"$text" || true
}
faults() {
  say "planted: 1, the flag does not wait for the rows; 2, it comes before the first row is sent; 4, the first" \
    "block of threads signs for all"
  local fault size way ways=("") missed=0
  [ "$gpus" -lt 2 ] || ways+=("--transport ipc --processes $most")
  for fault in 1 2 4; do
    for way in "${ways[@]}"; do
      # The largest size is the likeliest to show it. Nothing has shown the first yet: see
      # docs/gpu-tests.md.
      for size in 3 2 1; do
        # shellcheck disable=SC2086
        run_fault $fault $size $way && continue 2
        [ $fault != 1 ] || continue 2
      done
      missed=1
    done
  done
  say "planted: 3, combine does not wait for rows that leave from the experts' kernel"
  local program log job jobs=()
  program=$(find_program test_cuda_layer_ranks_fault_3) log=$checkpoints/fault_3
  for way in "${ways[@]}"; do  # Side by side: ranks whose peer has seen the fault wait for seconds.
    # shellcheck disable=SC2086
    "$program" $way --gtest_brief=1 --gtest_filter='*FewRows/0' >"$log${way// /_}" 2>&1 &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || true; done  # Both are to fail.
  for way in "${ways[@]}"; do
    printf 'fault 3 %s: ' "$way"
    if grep -q 'Expected equality of these values' "$log${way// /_}"; then
      echo 'noticed'
    else
      echo 'not noticed' && tail -n 5 "$log${way// /_}" && missed=1
    fi
  done
  say "a rank is killed, a rank is stopped"
  python3 tests/multirank/test_lost_rank.py "$sluice" | tail -n 8
  [ "$gpus" -lt 2 ] || [ $missed = 0 ] || { echo 'error: a planted fault was not noticed'; return 1; }
}

recipes() {
  "$sluice" make-checkpoint --preset r1-slice --out "$checkpoints/slice" | tail -n 1
  say "every recipe, verified against float64"
  local recipe mode n job jobs
  for recipe in direct direct-bf16 bf16-static requant-static static pow2-static direct-token; do
    jobs=()
    for mode in low-latency normal; do  # Side by side: nothing is timed here.
      "$sluice" run --checkpoint "$checkpoints/slice" --backend cuda --ranks 8 --tokens 64 \
        --mode $mode --recipe $recipe --repeat 3 >"$checkpoints/$mode.log" &
      jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    cat "$checkpoints"/{low-latency,normal}.log | grep -E '^(recipe|verified|outputs)'
  done
  for n in "${process_counts[@]}"; do
    say "the identity proof, $n processes"
    "$sluice" run --checkpoint "$checkpoints/slice" --backend cuda --transport ipc --ranks "$n" \
      --tokens 64 --repeat 3 --prove | grep -E '^(ranks|outputs|identity|verified)'
  done
}

link() {
  [ "$gpus" -gt 1 ] || { say "one GPU: no link"; return 0; }
  say "what the link gives to copies and kernels"
  "$(find_program bench_link)"
  local nccl hidden
  nccl=$(find_program bench_nccl)
  for ranks in "${rank_counts[@]}"; do
    for hidden in 7168 6144 3584; do
      say "NCCL, $ranks GPUs, hidden $hidden"
      "$nccl" --devices "$ranks" --hidden $hidden --json "$out/nccl-$ranks-$hidden.json"
    done
  done
}

exchange() {
  local transport=$1 hidden
  shift
  for ranks in "$@"; do
    for hidden in 7168 6144 3584; do
      say "dispatch and combine, $ranks ranks over $transport, hidden $hidden: low-latency, then normal"
      "$sluice" --json "$out/exchange-$transport-low-latency-$ranks-$hidden.json" bench exchange \
        --backend cuda --transport "$transport" --ranks "$ranks" --hidden $hidden \
        --tokens 1,16,64,128,256,1024,4096
      "$sluice" --json "$out/exchange-$transport-normal-$ranks-$hidden.json" bench exchange \
        --backend cuda --transport "$transport" --ranks "$ranks" --hidden $hidden --mode normal \
        --tokens 128,1024,4096 --pairs 4 --no-all-gather
    done
  done
}

layer() {
  say "the whole DeepSeek-R1 layer, 256 experts"
  "$sluice" make-checkpoint --preset r1-layer --out "$checkpoints/layer" | tail -n 1
  local transport ranks
  for transport in inproc ipc; do
    for ranks in "${process_counts[@]}"; do
      say "a layer beside its parts and stage by stage: $ranks ranks, $transport, low-latency, then normal"
      "$sluice" --json "$out/overlap-$transport-$ranks.json" bench layer --backend cuda --transport $transport \
        --ranks "$ranks" --tokens 1,16,64,128,256 --calls 6 --repeat 9
      "$sluice" --json "$out/overlap-normal-$transport-$ranks.json" bench layer --backend cuda --transport $transport \
        --ranks "$ranks" --mode normal --tokens 512,1024,2048,4096 --calls 3
      say "the same layer from a checkpoint, verified against float64"
      "$sluice" --json "$out/layer-$transport-$ranks.json" run --checkpoint "$checkpoints/layer" \
        --backend cuda --transport $transport --ranks "$ranks" --tokens 128 --repeat 20 --verify 4 |
        grep -E '^(ranks|slowest|experts|outputs|verified)'
    done
  done
}

date -u '+%F %T UTC'
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c
git log -1 --format='commit %h' 2>/dev/null || true
for part in "${parts[@]}"; do
  case $part in
    check | faults | recipes | link | layer) $part ;;
    streams) exchange inproc "${rank_counts[@]}" ;;
    processes) exchange ipc "${process_counts[@]}" ;;
    *) printf 'error: no part %s\n' "$part" >&2; exit 2 ;;
  esac
done
say "done: ${parts[*]}; tables in $out"
