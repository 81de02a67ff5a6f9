#!/usr/bin/env bash
# Several processes on this machine, with their own devices, talking over loopback.
#
#   launch/local.sh PROCESSES DEVICES COMMAND...
#   launch/local.sh 2 4 python -m experiments.graph_fusion --preset=smoke --workdir=runs/two
#
# DEVICES is the number of CPU devices of each process. Every line of output begins with its process.
# SIGTERM is passed on, and SIGINT as one; if one process fails, the others are stopped, and killed
# if they have not ended after GRACE seconds (60): who waits for a lost process may not hear SIGTERM.
set -euo pipefail

if (($# < 3)); then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
processes=$1 devices=$2
shift 2

python=$(command -v python || command -v python3)
port=$("$python" -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_COORDINATOR_BIND_ADDRESS="127.0.0.1:$port"
export JAX_NUM_PROCESSES="$processes" JAX_NUM_CPU_DEVICES="$devices"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

children=()
reaper=''
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"; if [[ -n $reaper ]]; then kill "$reaper" 2>/dev/null || true; fi' EXIT
# Only processes started here, and only those that still run.
stop() { for child in "${children[@]+"${children[@]}"}"; do kill "-$1" "$child" 2>/dev/null || true; done; }
trap 'stop TERM' TERM
# In the background, processes ignore SIGINT; what Ctrl-C means is TERM.
trap 'stop TERM' INT

for ((i = 0; i < processes; i++)); do
  mkfifo "$pipes/out$i" "$pipes/err$i"
  sed -u "s/^/[$i] /" <"$pipes/out$i" &
  sed -u "s/^/[$i] /" <"$pipes/err$i" >&2 &
  JAX_PROCESS_ID=$i "$@" >"$pipes/out$i" 2>"$pipes/err$i" &
  children+=($!)
done

status=0
while ((${#children[@]})); do
  # Not `wait -n`, which answers 127 where all children end between its look at them and its wait
  # (bash 5.2); the status of a child by its number is kept until it is asked for.
  sleep 0.1 || true # a terminal interrupts this too
  running=() code=0
  for child in "${children[@]}"; do
    if kill -0 "$child" 2>/dev/null; then
      running+=("$child")
    else
      wait "$child" || code=$?
    fi
  done
  children=("${running[@]+"${running[@]}"}")
  if ((code)); then
    if ((!status)); then status=$code; fi
    stop TERM
    if [[ -z $reaper ]] && ((${#children[@]})); then
      (
        sleep "${GRACE:-60}" >/dev/null 2>&1 &
        trap 'kill $!; exit' TERM
        wait $!
        stop KILL
      ) &
      reaper=$!
    fi
  fi
done
if [[ -n $reaper ]]; then kill "$reaper" 2>/dev/null || true; fi
# The last lines, unless something left behind keeps a pipe open.
for _ in {1..40}; do
  if [[ -z $(jobs -rp) ]]; then break; fi
  sleep 0.05
done
for job in $(jobs -rp); do kill "$job" 2>/dev/null || true; done
exit "$status"
