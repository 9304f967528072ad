#!/usr/bin/env bash
# two_networks.sh - `sluice run` over MPI across two network namespaces that one veth pair joins.
#
#   tests/multirank/two_networks.sh SLUICE MPIRUN [FLAGS...]
#
# Two processes of the job live in each namespace, as if on two machines that share nothing but a
# link: MPI is left no shared memory between them. Compares the digest of the outputs with that of
# threads. Then the link goes down in the middle of a run: both sides must end by themselves, with
# errors that name ranks. Everything it makes is in namespaces of its own and removed at the end, or by the
# next run if this one is killed.
# Exit 77: not run, the reason is printed.
set -euo pipefail
sluice=$1
shift
mpirun=("$@")

skip() { echo "skipped: $1"; exit 77; }
[ "$(id -u)" -eq 0 ] || skip "not root: network namespaces cannot be made"
command -v ip >/dev/null || skip "iproute2 is not installed"
remove_namespace() {
  ip netns pids "$1" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
  ip netns delete "$1" 2>/dev/null || true
}
# What killed runs have left: their names end in a process that is no more.
for left in $(ip netns list | grep -oE '^sluice-[ab]-[0-9]+' || true); do
  [ -e "/proc/${left##*-}" ] || remove_namespace "$left"
done
a=sluice-a-$$ b=sluice-b-$$
ip netns add "$a" 2>/dev/null || skip "this system lets nobody make a network namespace"
work=$(mktemp -d)
cleanup() {
  remove_namespace "$a"
  remove_namespace "$b"
  rm -rf "$work"
}
trap cleanup EXIT
ip netns add "$b"
ip link add va netns "$a" type veth peer name vb netns "$b" 2>/dev/null ||
  skip "this kernel has no veth devices"
for side in a b; do
  ns=$a address=10.77.0.1
  [ $side = a ] || { ns=$b address=10.77.0.2; }
  ip -n "$ns" address add $address/24 dev v$side
  ip -n "$ns" link set v$side up
  ip -n "$ns" link set lo up
done

# mpirun starts its daemon on the other "machine" through this instead of ssh.
cat >"$work/agent" <<EOF
#!/bin/sh
# agent HOST COMMAND...: the one other host is namespace $b.
shift
exec ip netns exec $b /bin/sh -c "\$*"
EOF
chmod +x "$work/agent"

"$sluice" make-checkpoint --preset tiny --out "$work/model" >/dev/null
run=(run --checkpoint "$work/model" --tokens 5,0,3,1 --verify 9)
digest() { sed -n 's/^outputs   digest //p' "$1"; }

across() {
  timeout 120 ip netns exec "$a" "${mpirun[@]}" --enable-recovery -n 4 --map-by ppr:2:node \
    --host 10.77.0.1:2,10.77.0.2:2 --mca plm_rsh_agent "$work/agent" \
    --mca oob_tcp_if_include 10.77.0.0/24 --mca btl_tcp_if_include 10.77.0.0/24 \
    --mca btl self,tcp --mca pml ob1 -x SLUICE_TIMEOUT_MS "$sluice" "$@" --transport mpi
}
export SLUICE_TIMEOUT_MS=10000
for mode in low-latency normal; do
  run+=(--mode $mode)
  "$sluice" "${run[@]}" --ranks 4 >"$work/threads"
  across "${run[@]}" >"$work/networks" || { cat "$work/networks"; echo "FAILED: $mode across networks"; exit 1; }
  [ -n "$(digest "$work/threads")" ] && [ "$(digest "$work/threads")" = "$(digest "$work/networks")" ] ||
    { cat "$work/networks"; echo "FAILED: $mode: other bytes than over threads"; exit 1; }
  echo "$mode: outputs $(digest "$work/networks"), the same over threads and across two networks"
  unset 'run[-1]' 'run[-1]'
done
bytes=$(ip -n "$a" -s link show va | awk '/TX/ { getline; print $1 }')
[ "$bytes" -gt 10000 ] || { echo "FAILED: only $bytes bytes crossed the link"; exit 1; }
echo "$bytes bytes crossed the link"

# The link goes down under a run that would last for minutes.
ranks() {
  for ns in "$a" "$b"; do
    for pid in $(ip netns pids "$ns"); do
      [ "$(readlink "/proc/$pid/exe" 2>/dev/null)" != "$(readlink -f "$sluice")" ] || echo "$pid"
    done
  done
}
SLUICE_TIMEOUT_MS=2000 across "${run[@]}" --repeat 100000 >"$work/cut" 2>&1 &
for _ in $(seq 100); do
  sleep 0.1
  [ "$(ranks | wc -l)" -lt 4 ] || break
done
sleep 2
[ "$(ranks | wc -l)" -eq 4 ] || { cat "$work/cut"; echo "FAILED: the long run did not start"; exit 1; }
ip -n "$a" link set va down
cut=$(date +%s%N)
while [ "$(ranks | wc -l)" -gt 0 ]; do
  [ $((($(date +%s%N) - cut) / 1000000)) -lt 15000 ] || { echo "FAILED: hung: $(ranks)"; exit 1; }
  sleep 0.05
done
echo "link cut: all four ranks had ended $((($(date +%s%N) - cut) / 1000000)) ms later (timeout 2000 ms)"
grep -a -m 2 "rank.*missing rank" "$work/cut" || { cat "$work/cut"; echo "FAILED: no rank is named"; exit 1; }
