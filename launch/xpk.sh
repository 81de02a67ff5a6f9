#!/usr/bin/env bash
# One workload on TPU slices of a GKE cluster through xpk, which writes the JobSet itself.
#
#   export CLUSTER=pods ZONE=us-east5-a PROJECT=mine DEVICE=v5p-256 IMAGE=REGISTRY/logitjax:tpu
#   launch/xpk.sh create NAME COMMAND...
#   launch/xpk.sh list
#   launch/xpk.sh logs NAME [POD_INDEX]
#   launch/xpk.sh delete NAME
#
#   launch/xpk.sh create fusion python -m experiments.graph_fusion --preset=paper \
#     --workdir=gs://bucket/fusion
#
# DEVICE is a TPU slice (v5p-256, v6e-64); for GPUs take launch/jobset.yaml. xpk starts again what
# ends with 75 or with 127 and above (launch/README.md has the statuses), until the run has made
# nothing new in twenty starts. DRY_RUN=1 prints the commands. More from the environment: SLICES (1),
# PRIORITY (medium), MAX_RESTARTS (1000). The image comes from launch/Dockerfile; JAX finds the other
# processes by what GKE tells the TPU runtime.
set -euo pipefail

usage() {
  sed -n '2,18s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
if (($# == 0)); then usage; fi
action=$1
shift
: "${CLUSTER:?set CLUSTER, of GKE}" "${ZONE:?set ZONE of the cluster}"
where=(--cluster="$CLUSTER" --zone="$ZONE")
if [[ -n ${PROJECT:-} ]]; then where+=(--project="$PROJECT"); fi

do_it() {
  if [[ ${DRY_RUN:-} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

case $action in
  create)
    if (($# < 2)); then usage; fi
    : "${DEVICE:?set DEVICE, such as v5p-256}" "${IMAGE:?set IMAGE, built from launch/Dockerfile}"
    name=$1
    shift
    printf -v command '%q ' "$@"
    do_it xpk workload create "${where[@]}" --workload="$name" --tpu-type="$DEVICE" \
      --num-slices="${SLICES:-1}" --docker-image="$IMAGE" --priority="${PRIORITY:-medium}" \
      --max-restarts="${MAX_RESTARTS:-1000}" --restart-on-exit-codes=75 \
      --env="LOGITJAX_RUN=$name" --command="${command% }"
    ;;
  list) do_it xpk workload list "${where[@]}" ;;
  logs)
    if (($# < 1)); then usage; fi
    do_it kubectl logs --follow --max-log-requests=64 \
      --selector="jobset.sigs.k8s.io/jobset-name=$1,batch.kubernetes.io/job-completion-index=${2:-0}"
    ;;
  delete)
    if (($# < 1)); then usage; fi
    do_it xpk workload delete "${where[@]}" --workload="$1"
    ;;
  *) usage ;;
esac
