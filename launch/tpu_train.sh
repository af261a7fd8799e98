#!/usr/bin/env bash
# A run on a Cloud TPU pod, from requesting the pod to deleting it, through the steps of launch/tpu_pod.sh:
#   export NAME=my-run ZONE=us-central2-b TYPE=v4-256 SPOT=1 REPOSITORY=https://...
#   bash launch/tpu_train.sh [--dry-run] pretrain --config=configs/v1.py:1x --workdir=gs://BUCKET/my-run
# A preempted pod is deleted and its request SUSPENDED permanently (cloud.google.com/tpu/docs/queued-resources), so this script
# deletes the request, makes a new one, installs again and resumes.  The pod is deleted when the run has ended by itself or was
# stopped with `tpu_pod.sh stop`.  Started again, this script reconnects to the run.
set -euo pipefail
dry=()
if [ "${1:-}" = --dry-run ]; then dry=(--dry-run); shift; fi
if [[ "${1:-}" != [a-z]* ]]; then echo "${1:-nothing}: expected a command of simclr, such as pretrain" >&2; exit 1; fi
command=("$@")
if [[ " $* " != *" --resume "* ]]; then command+=(--resume); fi
pod() { bash "$(dirname "$0")/tpu_pod.sh" "${dry[@]}" "$@"; }
note() { echo "$(date '+%F %T') $*"; }
if [ "${#dry[@]}" -gt 0 ]; then
  for step in create status setup "run ${command[*]@Q}" run_status delete; do eval "pod $step"; done
  exit
fi
trap 'note "this script ends; the pod does not: start it again, or bash launch/tpu_pod.sh delete"; exit 130' INT TERM
asked="" started="" errors="$(mktemp)"
while :; do
  state="$(pod status 2> "$errors")" || case "$(< "$errors")" in
    *NOT_FOUND*) state=NONE ;;
    *) state="$(< "$errors")" ;; # such as no network here
  esac
  case "$state" in
    NONE)
      note "asking for a pod"
      if pod create; then asked=1; elif [ -z "$asked" ]; then exit 1; fi ;; # a failure of the first request is the user's mistake
    SUSPENDED)
      note "the pod was preempted: asking for another"
      started=""
      pod delete || true ;;
    FAILED) note "the request failed: gcloud compute tpus queued-resources describe $NAME --zone=$ZONE says why"; exit 1 ;;
    ACTIVE)
      report="$(pod run_status)" || report=unknown
      note "$report"
      case "${started:-new} ${report##*$'\n'}" in
        *\ running) started=1 ;;
        "1 ended "*) code="${report##* }"; break ;;
        1\ unknown) ;; # no network here, or the pod is just being preempted
        *) if pod setup && pod run "${command[@]}"; then started=1; fi ;;
      esac ;;
    *) note "$state" ;;
  esac
  sleep "${POLL:-60}"
done
pod delete || note "the pod is still there: bash launch/tpu_pod.sh delete"
exit "$code"
