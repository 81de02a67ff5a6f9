#!/usr/bin/env bash
# A TPU slice of Google Cloud as virtual machines: ask for it, copy this tree, run on all workers.
#
#   export NAME=fusion ZONE=us-east5-a ACCELERATOR=v5p-256
#   launch/tpu_vm.sh create            queue the request (SPOT=1: may be taken away, costs less)
#   launch/tpu_vm.sh wait              until the slice is there
#   launch/tpu_vm.sh copy              tracked files as they are to all workers, and the installation
#   launch/tpu_vm.sh run COMMAND...    start on all workers, in the background
#   launch/tpu_vm.sh logs [WORKER]     follow the output of worker 0 (or another, or all)
#   launch/tpu_vm.sh status            state of the request, and of the command on each worker
#   launch/tpu_vm.sh stop              SIGTERM: the run saves, and the same command resumes it
#   launch/tpu_vm.sh delete
#   launch/tpu_vm.sh keep COMMAND...   all of it, again and again while the slice is taken away
#
#   launch/tpu_vm.sh run python -m experiments.graph_fusion --preset=paper --workdir=gs://bucket/run
#
# DRY_RUN=1 prints the commands instead. The workdir must be one that all workers see (gs://), or
# nothing survives the slice. No address is passed on: JAX asks the TPU runtime for the others.
# More from the environment: PROJECT, RUNTIME (chosen by ACCELERATOR), NETWORK, SUBNETWORK,
# SERVICE_ACCOUNT, INTERNAL_IPS=1, PYTHON_VERSION (3.12), DIRECTORY (logitjax), POLL seconds (30),
# ANSWERS (3): how often the cloud has to say that a slice is gone before `keep` deletes it. `keep`
# ends when the run has ended, or has made nothing new in twenty starts (starts.json in its workdir).
set -euo pipefail

usage() {
  sed -n '2,23s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
if (($# == 0)); then usage; fi
action=$1
shift
: "${NAME:?set NAME, of the slice}" "${ZONE:?set ZONE, such as us-east5-a}"
directory=${DIRECTORY:-logitjax}

# Everything that touches the cloud goes through here.
do_it() {
  if [[ ${DRY_RUN:-} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

place=(--zone="$ZONE")
if [[ -n ${PROJECT:-} ]]; then place+=(--project="$PROJECT"); fi

runtime() {
  case $ACCELERATOR in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *)
      echo "ACCELERATOR: no runtime known for $ACCELERATOR, set RUNTIME" >&2
      return 1
      ;;
  esac
}

create() {
  : "${ACCELERATOR:?set ACCELERATOR, such as v5p-256}"
  local version options=()
  version=${RUNTIME:-$(runtime)}
  if [[ ${SPOT:-} == 1 ]]; then options+=(--spot); fi
  if [[ -n ${NETWORK:-} ]]; then options+=(--network="$NETWORK"); fi
  if [[ -n ${SUBNETWORK:-} ]]; then options+=(--subnetwork="$SUBNETWORK"); fi
  if [[ -n ${SERVICE_ACCOUNT:-} ]]; then options+=(--service-account="$SERVICE_ACCOUNT"); fi
  if [[ ${INTERNAL_IPS:-} == 1 ]]; then options+=(--internal-ips); fi
  do_it gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$version" "${options[@]}"
}

# What the cloud says of the slice: ABSENT if it says that there is none, UNKNOWN if it says nothing.
state() {
  local answer errors
  errors=$(mktemp)
  if answer=$(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" \
    --format='value(state.state)' 2>"$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# Waits until the slice is there (0), or until the cloud has said ANSWERS times (3) running that it is
# gone (1). A poll that fails says nothing; one that names another state begins the count anew.
wait_for_slice() {
  local now answers=0
  if [[ ${DRY_RUN:-} == 1 ]]; then
    do_it gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" \
      --format='value(state.state)'
    return
  fi
  while true; do
    now=$(state)
    echo "$(date +%T) $NAME: $now" >&2
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | ABSENT) answers=$((answers + 1)) ;;
      UNKNOWN) ;;
      *) answers=0 ;;
    esac
    if ((answers >= ${ANSWERS:-3})); then return 1; fi
    sleep "${POLL:-30}"
  done
}

ssh_to() {
  local worker=$1
  do_it gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$worker" --command="$2"
}

copy() {
  local root archive install
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  archive=$(mktemp --suffix=.tar.gz)
  # The machines' own Python may be older than 3.11: uv brings one.
  if [[ -n $(git -C "$root" ls-files --others --exclude-standard) ]]; then
    echo "tpu_vm: files that git does not track are not copied (git status names them)" >&2
  fi
  install="mkdir -p $directory && tar -xzf $directory.tar.gz -C $directory && cd $directory"
  install+=" && python3 -m pip install --quiet --user uv && export PATH=\$HOME/.local/bin:\$PATH"
  install+=" && uv venv --quiet --allow-existing --python ${PYTHON_VERSION:-3.12} .venv"
  install+=" && uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs,all]'"
  # One after another: `keep` calls this where the shell does not stop at errors.
  # As they are, edits included: what was tried here is what runs there.
  (cd "$root" && do_it tar --create --gzip --file="$archive" --verbatim-files-from \
    --files-from=<(git ls-files --deduplicate | while read -r file; do
      if [[ -e $file ]]; then echo "$file"; fi
    done)) &&
    do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:$directory.tar.gz" "${place[@]}" \
      --worker=all &&
    rm -f "$archive" && ssh_to all "$install"
}

run() {
  if (($# == 0)); then usage; fi
  local command
  printf -v command '%q ' "$@"
  ssh_to all "cd $directory && PATH=\$PWD/.venv/bin:\$PATH LOGITJAX_RUN=$NAME launch/background.sh ${command% }"
}

status() {
  do_it gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" \
    --format='value(state.state)'
  ssh_to all "cd $directory && echo \"\$(hostname): \$(launch/background.sh --state)\""
}

stop() {
  ssh_to all "cd $directory && launch/background.sh --stop"
}

delete() {
  do_it gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

# 0 when the command ended well on worker 0, 1 when it ended badly, 2 when the slice is gone, 3
# when the run was only interrupted, of which a worker that was started anew in place is a case.
follow() {
  local ended
  if [[ ${DRY_RUN:-} == 1 ]]; then return 0; fi
  while true; do
    sleep "${POLL:-30}"
    wait_for_slice || return 2
    # Nothing where the worker cannot be reached just now.
    ended=$(ssh_to 0 "cd $directory && launch/background.sh --state" 2>/dev/null || true)
    case $ended in
      '' | RUNNING) ;;
      0) return 0 ;;
      75 | 134 | 137 | 143 | GONE | NONE) return 3 ;;
      *) return 1 ;;
    esac
  done
}

keep() {
  local outcome
  if (($# == 0)); then usage; fi
  for ((restart = 0; restart <= ${MAX_RESTARTS:-1000000}; restart++)); do
    if [[ ${DRY_RUN:-} == 1 || $(state) == ABSENT ]]; then create || true; fi
    outcome=2
    if wait_for_slice; then
      outcome=3
      # Of a run before, some workers may not have ended yet.
      if { ((restart == 0)) || stop; } && copy && run "$@"; then
        outcome=0
        follow || outcome=$?
      fi
    fi
    case $outcome in
      0 | 1) return "$outcome" ;;
      2) delete || true ;;
    esac
    echo "tpu_vm: interrupted, restart $((restart + 1))" >&2
    sleep "${POLL:-30}"
  done
  return 1
}

case $action in
  create) create ;;
  wait) wait_for_slice ;;
  copy) copy ;;
  run) run "$@" ;;
  logs) ssh_to "${1:-0}" "tail -n 100 -F $directory/run.log" ;;
  status) status ;;
  stop) stop ;;
  delete) delete ;;
  keep) keep "$@" ;;
  *) usage ;;
esac
