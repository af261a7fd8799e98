#!/usr/bin/env bash
# The whole story on one machine: set up, pretrain, evaluate h, export the encoder, leave a page to look at.
# Run again, it goes on from where it stopped.  RECIPE=textures bash launch/local.sh takes another recipe.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
recipe="${RECIPE:-smoke}"
workdir="${WORKDIR:-runs/$recipe}"
simclr pretrain --config="$recipe" --workdir="$workdir" --resume "$@"
simclr knn --workdir="$workdir"
simclr probe --workdir="$workdir"
simclr export --workdir="$workdir" --output="$workdir/export" --overwrite
echo "look at $workdir/report.html"
