#!/usr/bin/env bash
# Several processes on this machine, with their own devices, talking over loopback.
#
#   launch/local.sh PROCESSES DEVICES COMMAND...
#   launch/local.sh 2 4 python -m experiments.graph_fusion --preset=smoke --workdir=runs/two
#
# DEVICES is the number of CPU devices of each process. Every line of output begins with its process;
# the last one says which process failed first, and why. SIGTERM is passed on, and SIGINT as one; if
# one process fails, the others are stopped. What has not ended GRACE seconds (60) later is killed:
# who waits for a lost process, or has not begun to train, may not hear SIGTERM.
set -euo pipefail

if (($# < 3)); then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
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

children=() numbers=()
reaper=''
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"; if [[ -n $reaper ]]; then kill "$reaper" 2>/dev/null || true; fi' EXIT
# Only processes started here, and only those that still run.
stop() { for child in "${children[@]+"${children[@]}"}"; do kill "-$1" "$child" 2>/dev/null || true; done; }
end() {
  stop TERM
  if [[ -n $reaper ]] || ((${#children[@]} == 0)); then return; fi
  (
    sleep "${GRACE:-60}" >/dev/null 2>&1 &
    trap 'kill $!; exit' TERM
    wait $!
    stop KILL
  ) &
  reaper=$!
}
trap end TERM
# In the background, processes ignore SIGINT; what Ctrl-C means is TERM.
trap end INT

for ((i = 0; i < processes; i++)); do
  mkfifo "$pipes/out$i" "$pipes/err$i"
  sed -u "s/^/[$i] /" <"$pipes/out$i" &
  # What a process says of its end is kept for the last line.
  sed -u -e "/^error: /w $pipes/said$i" -e "s/^/[$i] /" <"$pipes/err$i" >&2 &
  JAX_PROCESS_ID=$i "$@" >"$pipes/out$i" 2>"$pipes/err$i" &
  children+=($!)
  numbers+=("$i")
done

status=0 first=''
while ((${#children[@]})); do
  # Not `wait -n`, which answers 127 where all children end between its look at them and its wait
  # (bash 5.2); the status of a child by its number is kept until it is asked for.
  sleep 0.1 || true # a terminal interrupts this too
  running=() left=() code=0
  for k in "${!children[@]}"; do
    if kill -0 "${children[k]}" 2>/dev/null; then
      running+=("${children[k]}")
      left+=("${numbers[k]}")
    else
      wait "${children[k]}" || code=$?
      if ((code && !status)); then status=$code first=${numbers[k]}; fi
    fi
  done
  children=("${running[@]+"${running[@]}"}") numbers=("${left[@]+"${left[@]}"}")
  if ((code)); then end; fi
done
if [[ -n $reaper ]]; then kill "$reaper" 2>/dev/null || true; fi
# The last lines, unless something left behind keeps a pipe open.
for _ in {1..40}; do
  if [[ -z $(jobs -rp) ]]; then break; fi
  sleep 0.05
done
for job in $(jobs -rp); do kill "$job" 2>/dev/null || true; done
if [[ -n $first ]]; then
  cause=$(tail -n 1 "$pipes/said$first" 2>/dev/null || true)
  case $status in
    134) cause=${cause:-JAX ended it, for another process is gone} ;;
    137) cause=${cause:-it was killed} ;;
    143) cause=${cause:-SIGTERM: it was told to stop} ;;
  esac
  echo "local: process $first ended first, with status $status: ${cause:-see above}" >&2
fi
exit "$status"
