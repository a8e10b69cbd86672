#!/usr/bin/env bash
# Train the playground with every preset for the same number of steps, from the same policy, with the same flags; evaluate
# the held-out questions before and after; write a table with intervals and a plot.
#   bash scripts/compare_algorithms.sh                       all presets with one seed, the main five with three
#   STEPS=80 SEEDS="0 1 2" ALGORITHMS="grpo dapo" bash scripts/compare_algorithms.sh --group_size 16
# Flags after the script's name go to train/main.py for every preset, over all others. A run that is finished is not
# repeated, one that was interrupted starts anew. A run that fails is listed at the end; the others still run.
set -euo pipefail
cd "$(dirname "$0")/.."
PLAYGROUND=${PLAYGROUND:-playground/seed0}
RUNS=${RUNS:-runs/algorithms}
STEPS=${STEPS:-40}
EVERY=${EVERY:-$((STEPS > 2 ? STEPS * 2 / 5 : 1))}   # steps between points of the plot; its first and last are evaluations
RANKS=${RANKS:-2}
SEEDS=${SEEDS:-"0 1 2"}
MAIN=${MAIN:-"grpo dr_grpo dapo gspo cispo"}   # with all seeds; the others with the first one only
ALGORITHMS=${ALGORITHMS:-"grpo dr_grpo dapo gspo cispo sapo rloo remax reinforce_pp gdpo ema_grpo luffy ppo opo"}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL=ERROR PYTHONWARNINGS=ignore
PATH="$(cd "${REELRL_VENV:-.venv}/bin" && pwd):$PATH"; export PATH

# The playground's scale, the same for all: frames, sizes, and a learning rate for a policy of a million parameters. What
# an algorithm is (advantage, loss, reduction, KL, clip, weight decay) stays as its preset has it.
cache=(--cache_dir "$PLAYGROUND/cache")
frames=(--fps 4 --min_frames 4 --max_frames 8 --video_min_pixels 4096 --video_max_pixels 4096)
images=(--image_min_pixels 4096 --image_max_pixels 4096)
shared=(--style direct --max_prompt_tokens 400 --max_response_tokens 24 --group_size 8 --prompts_per_step 32
  --token_budget 8192 --learning_rate 5e-4 --reward_workers 1 --log_rollouts 0)
if [ ! -e /dev/nvidia0 ]; then shared+=(--kv_cache_gib 0.1); fi
own() {  # own ALGORITHM: what an algorithm needs on the playground beside the shared flags
  case $1 in
    ppo) echo "--critic_learning_rate 1e-3" ;;  # the preset's 5e-6 is for billions of parameters, as 1e-6 is for the policy
  esac
}
evaluate() {  # evaluate MODEL RUN_DIR: predictions per question, which the intervals are made from
  [ -e "$2/results.json" ] || python evaluate/playground.py --model "$1" --data_dir "$PLAYGROUND" --no_blind --run_dir "$2" \
    "${cache[@]}" "${frames[@]}" --image_max_pixels 4096 --max_response_tokens 24
}

mkdir -p "$RUNS"
[ -e "$PLAYGROUND/complete.json" ] || python scripts/make_playground.py --output_dir "$PLAYGROUND" --seed 0
python data/preprocess.py --data "$PLAYGROUND"/train.jsonl "$PLAYGROUND"/heldout.jsonl \
  "${cache[@]}" --model "$PLAYGROUND/model" "${frames[@]}" >"$RUNS/preprocess.log" 2>&1
# LUFFY learns from demonstrations: the gold answers of the training questions, as the prompt asks for them. They stand
# beside the questions, because media paths start from the file's folder.
python scripts/algorithm_table.py demonstrations "$PLAYGROUND/train.jsonl" "$PLAYGROUND/train_demonstrations.jsonl"
printf '[compare] evaluate the starting policy\n'
evaluate "$PLAYGROUND/model" "$RUNS/before" >"$RUNS/before.log" 2>&1 || { tail -20 "$RUNS/before.log"; exit 1; }

failed=()
for algorithm in $ALGORITHMS; do
  for seed in $SEEDS; do
    [[ " $MAIN " == *" $algorithm "* ]] || [ "$seed" = "${SEEDS%% *}" ] || continue
    run="$RUNS/$algorithm-seed$seed" start=$SECONDS
    [ -e "$run/after/results.json" ] && continue
    data="$PLAYGROUND/train.jsonl"
    [ "$algorithm" = luffy ] && data="$PLAYGROUND/train_demonstrations.jsonl"
    printf '[compare] %s seed %s' "$algorithm" "$seed"
    if [ ! -e "$run/done.json" ]; then
      rm -rf "$run" && mkdir -p "$run"  # checkpoints are written at the end only: there is nothing to go on from
      # shellcheck disable=SC2046  # own() prints words
      torchrun --standalone --nproc_per_node "$RANKS" train/main.py --algorithm "$algorithm" --seed "$seed" \
        --model "$PLAYGROUND/model" --data "$data" --output_dir "$run" --max_steps "$STEPS" \
        "${cache[@]}" "${frames[@]}" "${images[@]}" "${shared[@]}" $(own "$algorithm") \
        --validate_data "$PLAYGROUND/heldout.jsonl" --validate_every "$EVERY" \
        --save_every 0 --keep_last 1 "$@" >"$run/console.log" 2>&1 || true
    fi
    if [ -e "$run/done.json" ] && evaluate "$run/final" "$run/after" >"$run/after.log" 2>&1; then
      rm -rf "$run/checkpoints"  # final/ is the policy; nothing resumes a finished run
      printf ': %s s\n' $((SECONDS - start))
    else
      failed+=("$algorithm seed $seed: $run/console.log, $run/after.log")
      printf ': failed\n'
    fi
  done
done
# shellcheck disable=SC2086  # names are words
python scripts/algorithm_table.py table "$RUNS" --main $MAIN
if [ ${#failed[@]} -gt 0 ]; then
  printf '[compare] failed: %s\n' "${failed[@]}"
  exit 1
fi
