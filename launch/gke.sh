#!/usr/bin/env bash
# A run on a GKE node pool of TPUs: fills in launch/gke_jobset.yaml and applies it; all other flags go to simclr.
#   NAME=my-run IMAGE=REGION-docker.pkg.dev/P/R/simclr:1 CONFIG=configs/v1.py:1x WORKDIR=gs://BUCKET/my-run HOSTS=32 \
#   ACCELERATOR=tpu-v4-podslice TOPOLOGY=4x4x8 CHIPS_PER_HOST=4 bash launch/gke.sh [--dry-run] [--config.key=value ...]
#   NAME=my-run bash launch/gke.sh [--dry-run] status | logs | stop       only affects this run; started again, it resumes
# SERVICE_ACCOUNT names the Kubernetes service account that may use the bucket (default: default), see docs/pods.md.
set -euo pipefail
shopt -u patsub_replacement 2> /dev/null || true  # bash 5.2 would replace & in a value by the matched text
dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
do_() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
plain() {  # a value of the environment, or a flag, can stand between double quotes in the manifest
  if [ -z "$2" ]; then echo "$1: is not set" >&2; exit 1; fi
  if [[ "$2" == *[\"\\\$$'\n']* ]]; then echo "$1: no quotes, backslashes, dollar signs or line breaks" >&2; exit 1; fi
}
plain NAME "${NAME:-}"
if [[ ! "$NAME" =~ ^[a-z][a-z0-9-]{0,39}$ ]]; then echo "NAME=$NAME: expected [a-z0-9-], 40 at most" >&2; exit 1; fi
case "${1:-}" in
  status) do_ kubectl get "jobset/$NAME" && do_ kubectl get pods "--selector=jobset.sigs.k8s.io/jobset-name=$NAME"; exit ;;
  logs) do_ kubectl logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"; exit ;;
  stop) do_ kubectl delete "jobset/$NAME"; exit ;;
  --* | "") ;;
  *) echo "$1: expected status, logs, stop, or flags of simclr pretrain" >&2; exit 1 ;;
esac
manifest="$(< "$(dirname "$0")/gke_jobset.yaml")"
export SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}"
for key in NAME IMAGE CONFIG WORKDIR HOSTS ACCELERATOR TOPOLOGY CHIPS_PER_HOST SERVICE_ACCOUNT; do
  value="${!key:-}"
  plain "$key" "$value"
  manifest="${manifest//"\${$key}"/$value}"
done
flags=""
for flag in "$@"; do
  plain "$flag" "$flag"
  if [ "$flag" = --overwrite ]; then echo "--overwrite: a JobSet resumes; delete the run, or name a new WORKDIR" >&2; exit 1; fi
  flags+=", \"$flag\""
done
manifest="${manifest//"\${FLAGS}"/$flags}"
if [ -n "$dry" ]; then echo "$manifest"; exit; fi
# A JobSet that has ended stays, and kubectl would leave it as it is, or refuse the change of a field.
ended="$(kubectl get "jobset/$NAME" --ignore-not-found --output='jsonpath={.status.terminalState}')"
if [ -n "$ended" ]; then kubectl delete "jobset/$NAME"; fi
kubectl apply -f - <<< "$manifest"
