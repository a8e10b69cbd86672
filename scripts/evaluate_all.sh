#!/usr/bin/env bash
# Evaluates a model on many benchmarks in one process (evaluate/all.py); a failing one does not stop the others.
#   MODEL=runs/mine/final DATA_DIR=benchmarks bash scripts/evaluate_all.sh [flags for every program]
#   BENCHMARKS="videomme mvbench mlvu" MODEL=… bash scripts/evaluate_all.sh --data_parallel 8 --cache_dir cache
# Stopping it and running it again goes on where it was. Exit status: 0 if every benchmark ended well.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?MODEL=FOLDER is needed: the Hugging Face folder to evaluate}"
venv=${REELRL_VENV:-.venv}
[ -d "$venv/bin" ] && PATH="$(cd "$venv/bin" && pwd):$PATH" && export PATH
# shellcheck disable=SC2086  # a list of words
exec python evaluate/all.py ${BENCHMARKS:+--benchmarks $BENCHMARKS} --model "$MODEL" --data_dir "${DATA_DIR:-benchmarks}" "$@"
