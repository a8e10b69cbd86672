#!/usr/bin/env bash
# bash scripts/test.sh         ruff and the fast tests (12 minutes at most on 2 cores, after the install)
# bash scripts/test.sh --all   adds the slow real runs (45 minutes at most);  further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
marks=(-m "not slow and not gpu")
if [ "${1:-}" = "--all" ]; then shift; marks=(-m "not gpu"); fi
bash scripts/setup.sh
venv=${REELRL_VENV:-.venv}
PATH="$(cd "$venv/bin" && pwd):$PATH"
export PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
echo "[test] ruff"; ruff check .
echo "[test] pytest ${marks[*]} $*"
exec python -m pytest "${marks[@]}" "$@"
