#!/usr/bin/env bash
# Read by `run` and `nightly`: stages that say what they cost, a second Python, and smoke runs.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export scratch
costs=()
failed=()
keep_going=no
other=""
spent=0

# Sets `spent` to the CPU-seconds of all that this shell has waited for. A subshell would have waited
# for nothing, so what `times` prints goes through a file.
measure() {
  local parts
  LC_ALL=C times >"$scratch/times.$$"
  IFS=$'ms \n' read -r -d '' -a parts <"$scratch/times.$$" || true
  local n milliseconds=0
  for ((n = 0; n + 1 < ${#parts[@]}; n += 2)); do
    # "1.234" without the point.
    milliseconds=$((milliseconds + 60000 * parts[n] + 10#${parts[n + 1]/[.,]/}))
  done
  spent=$((milliseconds / 1000))
}

# stage NAME COMMAND...: ends the script where the command fails; with `keep_going=yes` it goes on.
stage() {
  local name=$1 begin=$SECONDS before status line
  shift
  echo "== $name"
  measure
  before=$spent
  # In a condition the shell would not stop a function of several commands at the first that fails.
  set +e
  (
    set -e
    "$@"
  ) 2>&1 | tee "$scratch/stage.log"
  status=$?
  set -e
  measure
  line=$(printf '%6d CPU-seconds, %5d s  %s' $((spent - before)) $((SECONDS - begin)) "$name")
  if ((status)); then
    failed+=("$name")
    line+=" FAILED"
  fi
  echo "$line"
  costs+=("$line")
  # What pytest counted is said again at the end.
  { grep -E '[0-9]+ (passed|failed|error).* in [0-9.]+s' "$scratch/stage.log" || true; } |
    sed "s/^/$name: /" >>"$scratch/counts"
  if ((status)) && [[ "$keep_going" != yes ]]; then
    echo "FAILED: $name"
    exit 1
  fi
}

# finish [BAR]: the stages, their sum beside what it should be, and what pytest counted.
finish() {
  measure
  printf '\n== in all\n'
  printf '%s\n' "${costs[@]}"
  printf '%6d CPU-seconds in all%s\n' "$spent" "${1:+, of at most $1}"
  cat "$scratch/counts"
  if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    return 1
  fi
}

# Sets `other` to a Python beside the first one, where there is one.
find_other_python() {
  local first candidate
  first=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  for candidate in python3.13 python3.12; do
    if [[ "$candidate" != "python$first" ]] && "$candidate" -m venv "$scratch/probe" 2>/dev/null; then
      # shellcheck disable=SC2034
      other=$candidate
      return
    fi
  done
}

# smoke NAME PYTHON MODULE FLAG...: quiet where all is well.
smoke() {
  local name=$1 python=$2 begin=$SECONDS
  shift 2
  if "$python" -m "$@" >"$scratch/$name.log" 2>&1; then
    measure
    echo "smoke: $name, $spent CPU-seconds, $((SECONDS - begin)) s"
  else
    cat "$scratch/$name.log"
    echo "smoke: $name FAILED"
    return 1
  fi
}
export -f smoke measure

# smokes COMMANDS: runs what the function COMMANDS prints, a line of `smoke` each. A smoke run is
# mostly compilation, which keeps one core busy: two at a time, optimised as little as in tests.
# Many compile the same.
smokes() {
  "$1" |
    XLA_FLAGS=--xla_backend_optimization_level=0 \
      JAX_COMPILATION_CACHE_DIR="$scratch/jax" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 \
      xargs -r -L 1 -P 2 bash -c 'smoke "$@"' smoke
}
