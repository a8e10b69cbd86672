#!/usr/bin/env bash
# The whole life of a policy in one command, on a machine without a GPU too: set up, build the playground (real video files
# and a tiny Qwen3-VL), decode every clip once, evaluate, train by RL on two ranks, evaluate again, and write a report.
#   bash scripts/quickstart.sh        SEED=1 bash scripts/quickstart.sh        RUN=runs/mine STEPS=20 CLIPS=200 bash scripts/quickstart.sh
# A second run skips what is already there; a training that was interrupted goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-0}
RUN=${RUN:-runs/quickstart-seed$SEED}
PLAYGROUND=${PLAYGROUND:-playground/seed$SEED}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL=ERROR PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error TORCH_CPP_LOG_LEVEL=ERROR HF_HUB_DISABLE_PROGRESS_BARS=1
timings=()
stage() {  # stage NAME MARKER COMMAND...: runs COMMAND unless MARKER exists, and notes how long it took
  local name=$1 marker=$2 start=$SECONDS; shift 2
  if [ -n "$marker" ] && [ -e "$marker" ]; then
    printf '[quickstart] %s: already there (%s)\n' "$name" "$marker"; timings+=("$name|there"); return
  fi
  printf '[quickstart] %s\n' "$name"
  "$@"
  timings+=("$name|$((SECONDS - start)) s")
}
stage "set up the environment" "" bash scripts/setup.sh
PATH="$(cd "${REELRL_VENV:-.venv}/bin" && pwd):$PATH"; export PATH
ranks=${RANKS:-2}
# What the playground's clips are looked at with: the same words for every program.
frames=(--fps 4 --min_frames 4 --max_frames 8 --video_min_pixels 4096 --video_max_pixels 4096)
images=(--image_min_pixels 4096 --image_max_pixels 4096)
cache=(--cache_dir "$PLAYGROUND/cache")
train=(--style direct --max_prompt_tokens 400 --max_response_tokens 24 --group_size 8 --prompts_per_step 32 --token_budget 8192
  --kl_in none --kl_coef 0 --loss_reduction token_mean --learning_rate 5e-4 --max_steps "${STEPS:-80}" --save_every 40 --keep_last 1 --reward_workers 1)
if [ ! -e /dev/nvidia0 ]; then train+=(--kv_cache_gib 0.1); fi
evaluate() {  # evaluate MODEL NAME
  python evaluate/playground.py --model "$1" --data_dir "$PLAYGROUND" --run_dir "$RUN/$2" "${cache[@]}" "${frames[@]}" \
    --image_max_pixels 4096 --max_response_tokens 24
}
stage "build the playground: clips, questions, a tiny policy that sees a little" "$PLAYGROUND/complete.json" \
  python scripts/make_playground.py --output_dir "$PLAYGROUND" --seed "$SEED" --clips "${CLIPS:-800}" \
    --max_warm_start_steps "${WARM_START_STEPS:-400}"
stage "decode every clip once" "" \
  python data/preprocess.py --data "$PLAYGROUND"/{train,heldout,heldout_blind}.jsonl "${cache[@]}" --model "$PLAYGROUND/model" "${frames[@]}"
stage "evaluate the starting policy" "$RUN/before/results.json" evaluate "$PLAYGROUND/model" before
stage "train by RL on $ranks ranks" "$RUN/done.json" \
  torchrun --standalone --nproc_per_node "$ranks" train/main.py --model "$PLAYGROUND/model" --data "$PLAYGROUND/train.jsonl" \
    "${cache[@]}" "${frames[@]}" "${images[@]}" --output_dir "$RUN" --seed "$SEED" "${train[@]}"
stage "evaluate the trained policy" "$RUN/after/results.json" evaluate "$RUN/final" after
stage "write the report" "" python scripts/make_report.py "$RUN"
python scripts/compare_runs.py "$RUN/before" "$RUN/after"
printf '\n[quickstart] what each part took\n'
printf '%s\n' "${timings[@]}" | while IFS='|' read -r name took; do printf '  %-64s %s\n' "$name" "$took"; done
printf '  %-64s %s\n' "all" "$SECONDS s"
printf '[quickstart] report: %s\n' "$(cd "$RUN" && pwd)/report.html"
