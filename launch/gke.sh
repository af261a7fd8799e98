#!/usr/bin/env bash
# Fills in launch/gke_jobset.yaml and applies it.
#   NAME=my-run IMAGE=REGION-docker.pkg.dev/P/R/simclr:1 CONFIG=configs/v1.py:1x WORKDIR=gs://BUCKET/my-run HOSTS=32 \
#   ACCELERATOR=tpu-v4-podslice TOPOLOGY=4x4x8 CHIPS_PER_HOST=4 bash launch/gke.sh [--dry-run]
set -euo pipefail
shopt -u patsub_replacement 2> /dev/null || true  # of bash 5.2, to which & in a value would mean what it replaces
manifest="$(< "$(dirname "$0")/gke_jobset.yaml")"
for key in NAME IMAGE CONFIG WORKDIR HOSTS ACCELERATOR TOPOLOGY CHIPS_PER_HOST; do
  value="${!key:-}"
  if [ -z "$value" ]; then echo "$key: is not set" >&2; exit 1; fi
  if [[ "$value" == *[\"\\\$$'\n']* ]]; then echo "$key: no quotes, backslashes, dollar signs or line breaks" >&2; exit 1; fi
  manifest="${manifest//"\${$key}"/$value}"
done
if [ "${1:-}" = --dry-run ]; then echo "$manifest"; else kubectl apply -f - <<< "$manifest"; fi
