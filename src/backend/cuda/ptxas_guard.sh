#!/bin/sh
# ptxas_guard.sh - runs the compiler command and fails if ptxas says that wgmma got serialized.
# Those messages (C75xx) are only informational to nvcc, and cost half the speed. Builds with device
# checks (-DSLUICE_DEVICE_CHECK) may be slow.
set -u
case " $* " in *" -DSLUICE_DEVICE_CHECK"*) exec "$@" ;; esac
log=$(mktemp)
"$@" >"$log" 2>&1
status=$?
cat "$log" >&2
if [ $status -eq 0 ] && grep -Eq '\(C75[0-9][0-9]\)|serialized' "$log"; then
  echo "ptxas_guard: wgmma serialized, see above" >&2
  status=1
fi
rm -f "$log"
exit $status
