#!/usr/bin/env bash
# Starts a command that outlives the connection it was started from.
#
#   launch/background.sh COMMAND...
#
# Leaves in the current directory: run.pid (kill -TERM it, and the command is told to stop),
# run.log (appended to) and, once the command has ended, run.status.
set -euo pipefail

if (($# == 0)); then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
if [[ $1 != --inside ]]; then
  rm -f run.status
  setsid nohup "$0" --inside "$@" >>run.log 2>&1 </dev/null &
  echo $! >run.pid
  exit 0
fi
shift
# Heard before the command has begun, too: TERM without a trap would leave it alone and unwatched.
asked="" child=""
tell() { [[ -z "$asked" || -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true; }
trap 'asked=yes; tell' TERM
"$@" &
child=$!
tell
while true; do
  status=0
  wait "$child" || status=$?
  # A trapped signal ends wait too, with the command still running.
  if ! kill -0 "$child" 2>/dev/null; then break; fi
done
echo "$status" >run.status
