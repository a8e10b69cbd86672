#!/usr/bin/env bash
# Evaluates a model on many benchmarks, one program after another; a failing one does not stop the others.
#   MODEL=runs/mine/final DATA_DIR=benchmarks bash scripts/evaluate_all.sh [flags for every program]
#   BENCHMARKS="videomme mvbench mlvu" MODEL=… bash scripts/evaluate_all.sh --data_parallel 8 --cache_dir cache
# Stopping it and running it again goes on where it was. Exit status: 0 if every benchmark ended well.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?MODEL=FOLDER is needed: the Hugging Face folder to evaluate}"
DATA_DIR=${DATA_DIR:-benchmarks}
BENCHMARKS=${BENCHMARKS:-videomme videomme_v2 mvbench tempcompass motionbench lvbench longvideobench mlvu videoholmes minerva
  vcrbench videoreasonbench longvideoreason mmvu videommmu videomathqa vsibench charades_sta stvg ovobench odvbench
  livesports videommlu timelens}
venv=${REELRL_VENV:-.venv}
[ -d "$venv/bin" ] && PATH="$(cd "$venv/bin" && pwd):$PATH" && export PATH
failed=()
for benchmark in $BENCHMARKS; do
  if [ ! -f "evaluate/$benchmark.py" ]; then
    echo "[evaluate] there is no evaluate/$benchmark.py"; failed+=("$benchmark"); continue
  fi
  echo "[evaluate] $benchmark"
  python "evaluate/$benchmark.py" --model "$MODEL" --data_dir "$DATA_DIR" "$@" || failed+=("$benchmark ($?)")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "[evaluate] did not end well: ${failed[*]} (2: annotations or media missing, 3: failed samples, 4: not finished)"
  exit 1
fi
echo "[evaluate] all done"
