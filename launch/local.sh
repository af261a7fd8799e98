#!/usr/bin/env bash
# The whole workflow on one machine: set up, pretrain, evaluate h, export the encoder, write a report page.
# Running it again resumes where it stopped.  RECIPE=textures bash launch/local.sh uses another recipe.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
recipe="${RECIPE:-smoke}"
workdir="${WORKDIR:-runs/$recipe}"
simclr pretrain --config="$recipe" --workdir="$workdir" --resume "$@"
simclr knn --workdir="$workdir"
simclr probe --workdir="$workdir"
simclr export --workdir="$workdir" --output="$workdir/export" --overwrite
echo "open $workdir/report.html"
