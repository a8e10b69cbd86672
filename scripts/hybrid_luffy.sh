#!/usr/bin/env bash
# Learning from demonstrations and from own responses at once: LUFFY (arXiv 2504.14945) on Qwen3-VL-8B-Instruct. One of the 8
# places of a group goes to the row's demonstration (`offline_output`, for example a stronger model's reasoning), 7 are sampled;
# advantages are over all 8; the demonstration's tokens learn through f(p) = p / (p + 0.1) instead of a clipped ratio.
#   MODEL=Qwen3-VL-8B-Instruct DATA=train_with_demonstrations.jsonl HELD_OUT=heldout.jsonl bash scripts/hybrid_luffy.sh
#   DEMONSTRATIONS=group_accuracy bash scripts/hybrid_luffy.sh       only where the policy itself does badly: EasyVideoR1's gate
#   DEMONSTRATIONS=own_reward bash scripts/hybrid_luffy.sh           only demonstrations that are right by the reward
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/hybrid_luffy.sh       several nodes: scripts/torchrun_nodes.sh
#   bash scripts/hybrid_luffy.sh --explain                           all of what the algorithm's flags do; any flag may follow and wins
#   PLAYGROUND=playground/seed0 bash scripts/hybrid_luffy.sh         the small twin, any machine: gold answers are the demonstrations
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen3-VL-8B-Instruct}
DATA=${DATA:-data/hybrid/train_with_demonstrations.jsonl}
HELD_OUT=${HELD_OUT:-data/hybrid/heldout.jsonl}
CACHE_DIR=${CACHE_DIR:-cache}
OUTPUT_DIR=${OUTPUT_DIR:-runs/hybrid_luffy}
DEMONSTRATIONS=${DEMONSTRATIONS:-always}
PATH="$(cd "${REELRL_VENV:-.venv}/bin" && pwd):$PATH"; export PATH
if [ -n "${PLAYGROUND:-}" ]; then
  MODEL=$PLAYGROUND/model DATA=$PLAYGROUND/train_demonstrations.jsonl HELD_OUT=$PLAYGROUND/heldout.jsonl CACHE_DIR=
  OUTPUT_DIR=${RUN:-runs/hybrid_luffy_playground}
  [ -e "$DATA" ] || python scripts/algorithm_table.py demonstrations "$PLAYGROUND/train.jsonl" "$DATA"
fi
read -ra data <<<"$DATA"
read -ra held_out <<<"$HELD_OUT"

flags=(
  --model "$MODEL" --data "${data[@]}" --output_dir "$OUTPUT_DIR" --seed 42
  ${CACHE_DIR:+--cache_dir "$CACHE_DIR"}
  --shuffle --style think
  # frames and pixels: as in scripts/video_rl_qwen3_vl_8b.sh
  --fps 2 --max_frames 128
  --video_min_pixels 3136 --video_max_pixels 262144 --image_min_pixels 3136 --image_max_pixels 1048576
  --max_prompt_tokens 20000 --on_long_prompt resample
  # rollout. One GPU per engine: see scripts/video_rl_qwen3_vl_8b.sh
  --group_size 8 --prompts_per_step 128 --max_response_tokens 4096
  --temperature 1.0 --top_p 1.0 --top_k -1
  --tensor_parallel 1 --gpu_memory_utilization 0.6 --max_num_batched_tokens 25000 --sleep_level 2
  # reward
  --accuracy_weight 0.9 --format_weight 0.1
  # algorithm. The row "luffy" of the preset table sets advantage, policy loss, reduction and entropy bonus as the paper has them.
  --algorithm luffy --demonstrations "$DEMONSTRATIONS" --demonstration_threshold 0.5
  --demonstration_loss luffy --luffy_gamma 0.1 --demonstration_on_long truncate
  --kl_in none --kl_coef 0
  # update: one per step, since the preset's loss has no ratio (the paper's runs: two)
  --prompts_per_update 128 --update_epochs 1 --token_budget 53248
  --optimizer adamw --learning_rate 1e-6 --lr_schedule constant --warmup_steps 0
  --adam_betas 0.9 0.999 --weight_decay 0.01 --max_grad_norm 1.0
  # validation, checkpoints, length
  --validate_data "${held_out[@]}" --validate_every 10 --validate_at_start
  --validate_samples 1 --validate_temperature 0.7 --validate_top_p 0.95
  --max_steps 200 --save_every 20 --keep_last 10 --keep_best validate/accuracy
  --phase_limit_s 7200
)
if [ -n "${PLAYGROUND:-}" ]; then
  source scripts/playground_flags.sh
  flags+=("${small[@]}")
fi
exec bash scripts/torchrun_nodes.sh train/main.py "${flags[@]}" "$@"
