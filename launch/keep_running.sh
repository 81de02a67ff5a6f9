#!/usr/bin/env bash
# Runs a command again for as long as it is only interrupted; the same command resumes its workdir.
#
#   launch/keep_running.sh COMMAND...
#   launch/keep_running.sh launch/local.sh 2 4 python -m experiments.graph_fusion --workdir=runs/two
#
# Interrupted is: told to stop by SIGTERM and saved (143), killed (137), a disk, a store, a hub or
# another process failed or hangs (75, or 134 where the JAX runtime said so first). Any other status ends the loop: a wrong
# flag (2) will not become right, and neither will twenty starts without a new checkpoint, which end
# with 2 as well. SIGTERM and SIGINT to this script go to the command and end the loop too. PAUSE,
# seconds between two starts (10), and MAX_RESTARTS (no limit) come from the environment.
# LOGITJAX_RUN, made here if it is not set, lets a restart take over the workdir's lock at once.
set -euo pipefail

if (($# == 0)); then
  sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
export LOGITJAX_RUN="${LOGITJAX_RUN:-$(uname -n)-$$-$(date +%s)}"
child='' told=''
pass() {
  told=$1
  if [[ -n $child ]]; then kill "-$1" "$child" 2>/dev/null || true; fi
}
trap 'pass TERM' TERM
trap 'pass INT' INT

for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  # A signal may have come before there was a child to pass it on to.
  if [[ -n $told ]]; then pass "$told"; fi
  while true; do
    status=0
    wait "$child" || status=$?
    # A trapped signal ends wait too, with the command still running.
    if ! kill -0 "$child" 2>/dev/null; then break; fi
  done
  case $status in
    75 | 134 | 137 | 143) ;;
    *) exit "$status" ;;
  esac
  if [[ -n $told ]] || ((restart >= ${MAX_RESTARTS:-1000000})); then exit "$status"; fi
  echo "keep_running: status $status, restart $((restart + 1))" >&2
  sleep "${PAUSE:-10}" &
  child=$!
  wait "$child" || true
  if [[ -n $told ]]; then exit "$status"; fi
done
