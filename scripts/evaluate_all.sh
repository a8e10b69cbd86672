#!/usr/bin/env bash
# Evaluates a model on many benchmarks in one process (evaluate/all.py); a failing one does not stop the others.
#   MODEL=runs/mine/final DATA_DIR=benchmarks bash scripts/evaluate_all.sh [flags for every program]
#   BENCHMARKS="videomme mvbench mlvu" MODEL=… bash scripts/evaluate_all.sh --data_parallel 8 --cache_dir cache
# MODEL: the Hugging Face folder; DATA_DIR: annotation files and media (benchmarks if left out); BENCHMARKS: names of
# programs in evaluate/ (all of evaluate/all.py's list if left out); REELRL_VENV: the environment (.venv if left out).
# Stopping it and running it again goes on where it was. Exit status: 0 if every benchmark ended well, else 1; 130 after Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in
  *" --help "* | *" -h "*)
    sed -n '2,/^set /s/^# \{0,1\}//p' scripts/evaluate_all.sh && echo
    MODEL=none ;;
esac
: "${MODEL:?MODEL=FOLDER is needed: the Hugging Face folder to evaluate (--help says more)}"
venv=${REELRL_VENV:-.venv}
[ -d "$venv/bin" ] && PATH="$(cd "$venv/bin" && pwd):$PATH" && export PATH
# shellcheck disable=SC2086  # a list of words
exec python evaluate/all.py ${BENCHMARKS:+--benchmarks $BENCHMARKS} --model "$MODEL" --data_dir "${DATA_DIR:-benchmarks}" "$@"
