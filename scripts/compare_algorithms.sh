#!/usr/bin/env bash
# Train the playground with every preset for the same number of steps; a table and a plot of held-out accuracy.
#   bash scripts/compare_algorithms.sh                       all presets with one seed, the main five with three
#   STEPS=40 SEEDS="0 1 2" ALGORITHMS="grpo dapo" bash scripts/compare_algorithms.sh --group_size 16
# Flags after the script's name go to train/main.py for every preset. A run that is finished is not repeated, one that was
# interrupted goes on from its last checkpoint. A run that fails is listed at the end; the others still run.
set -euo pipefail
cd "$(dirname "$0")/.."
PLAYGROUND=${PLAYGROUND:-playground/seed0}
RUNS=${RUNS:-runs/algorithms}
STEPS=${STEPS:-60}
EVERY=${EVERY:-10}
RANKS=${RANKS:-2}
SEEDS=${SEEDS:-"0 1 2"}
MAIN=${MAIN:-"grpo dr_grpo dapo gspo cispo"}   # with all seeds; the others with the first one only
ALGORITHMS=${ALGORITHMS:-"grpo dr_grpo dapo gspo cispo sapo rloo remax reinforce_pp gdpo ema_grpo luffy ppo opo"}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL=ERROR PYTHONWARNINGS=ignore
export PATH="$PWD/${REELRL_VENV:-.venv}/bin:$PATH"
[ -e "$PLAYGROUND/complete.json" ] || python scripts/make_playground.py --output_dir "$PLAYGROUND" --seed 0
python data/preprocess.py --data "$PLAYGROUND"/train.jsonl "$PLAYGROUND"/heldout.jsonl \
  --cache_dir "$PLAYGROUND/cache" --model "$PLAYGROUND/model"
mkdir -p "$RUNS"
# LUFFY learns from demonstrations: the gold answers of the training questions, as the prompt asks for them.
python scripts/algorithm_table.py demonstrations "$PLAYGROUND/train.jsonl" "$PLAYGROUND/train_demonstrations.jsonl"
failed=()
for algorithm in $ALGORITHMS; do
  for seed in $SEEDS; do
    [[ " $MAIN " == *" $algorithm "* ]] || [ "$seed" = "${SEEDS%% *}" ] || continue
    run="$RUNS/$algorithm-seed$seed"
    [ -e "$run/done.json" ] && continue
    data="$PLAYGROUND/train.jsonl"
    [ "$algorithm" = luffy ] && data="$PLAYGROUND/train_demonstrations.jsonl"
    printf '[compare] %s seed %s\n' "$algorithm" "$seed"
    mkdir -p "$run"
    torchrun --standalone --nproc_per_node "$RANKS" train/main.py --algorithm "$algorithm" --seed "$seed" \
      --model "$PLAYGROUND/model" --data "$data" --cache_dir "$PLAYGROUND/cache" --output_dir "$run" \
      --max_steps "$STEPS" --validate_data "$PLAYGROUND/heldout.jsonl" --validate_at_start --validate_every "$EVERY" \
      --save_every "$STEPS" --keep_last 1 "$@" >"$run/console.log" 2>&1 || failed+=("$algorithm seed $seed: $run/console.log")
  done
done
python scripts/algorithm_table.py table "$RUNS" --main $MAIN
if [ ${#failed[@]} -gt 0 ]; then
  printf '[compare] failed: %s\n' "${failed[@]}"
  exit 1
fi
