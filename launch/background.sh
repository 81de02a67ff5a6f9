#!/usr/bin/env bash
# Starts a command that outlives the connection it was started from.
#
#   launch/background.sh COMMAND...
#   launch/background.sh --state    RUNNING, GONE (the machine was started anew) or its status
#   launch/background.sh --stop     TERM, and KILL what has not ended GRACE seconds (180) later
#
# Leaves in the current directory: run.pid, with the number of the machine's start beside it, run.log
# (appended to) and, once the command has ended, run.status. One command a directory: a second one is
# refused while the first still runs.
set -euo pipefail

if (($# == 0)); then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
# After a reboot the number of a process is another's, or nobody's.
boot() { cat "${BOOT_ID:-/proc/sys/kernel/random/boot_id}"; }
pid='' booted=''
state() {
  if [[ ! -e run.pid ]]; then echo NONE; return; fi
  if [[ -s run.status ]]; then cat run.status; return; fi
  read -r pid booted <run.pid
  if [[ $booted == "$(boot)" ]] && kill -0 "$pid" 2>/dev/null; then echo RUNNING; else echo GONE; fi
}

case $1 in
  --state)
    state
    exit
    ;;
  --stop)
    if [[ $(state) != RUNNING ]]; then exit 0; fi
    read -r pid booted <run.pid
    kill -TERM "$pid" 2>/dev/null || true
    for ((second = 0; second < 10 * ${GRACE:-180}; second++)); do
      if ! kill -0 "$pid" 2>/dev/null; then exit 0; fi
      sleep 0.1
    done
    # The whole group: a command that ignores TERM has children, too.
    kill -KILL "-$pid" 2>/dev/null || true
    exit 0
    ;;
  --inside) shift ;;
  *)
    if [[ $(state) == RUNNING ]]; then
      echo "background: process $(cut -d' ' -f1 run.pid) still runs here; stop it first" >&2
      exit 1
    fi
    rm -f run.status
    setsid nohup "$0" --inside "$@" >>run.log 2>&1 </dev/null &
    echo "$! $(boot)" >run.pid
    exit 0
    ;;
esac
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
