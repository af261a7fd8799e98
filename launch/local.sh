#!/usr/bin/env bash
# The whole workflow on one machine: set up, pretrain, write a report page, export the encoder, evaluate h.
# Running it again resumes where it stopped.  RECIPE=textures bash launch/local.sh uses another recipe.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
recipe="${RECIPE:-smoke}"
workdir="${WORKDIR:-runs/$recipe}"
simclr pretrain --config="$recipe" --workdir="$workdir" --resume "$@"
simclr export --workdir="$workdir" --output="$workdir/export" --overwrite
echo "open $workdir/report.html"
simclr knn --workdir="$workdir"  # these two need labels, and come last, so that without them all else is made
simclr probe --workdir="$workdir"
