#!/usr/bin/env bash
# One policy for image, video and text together: Qwen3-VL-8B-Instruct with EasyVideoR1's settings for joint training: GRPO, clip
# 0.2 / 0.28, no KL, 8 responses to each of 512 prompts, two updates per step, long prompts and responses of 16,384 tokens.
#   MODEL=Qwen3-VL-8B-Instruct DATA="video.jsonl image.jsonl text.jsonl" HELD_OUT=heldout.jsonl CACHE_DIR=cache \
#     bash scripts/unified_rl_qwen3_vl_8b.sh
#   DATA="video.jsonl::2 image.jsonl::1 text.jsonl::1"                                    shares of an epoch, whatever the files' sizes
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/unified_rl_qwen3_vl_8b.sh      several nodes: scripts/torchrun_nodes.sh
#   bash scripts/unified_rl_qwen3_vl_8b.sh --dry_run                                      the plan; any flag may follow and wins
#   PLAYGROUND=playground/seed0 bash scripts/unified_rl_qwen3_vl_8b.sh                    the small twin, any machine
# Batches mix all three kinds: every micro-batch makes one call of the vision tower, also one of text alone, so ranks stay in step.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen3-VL-8B-Instruct}
DATA=${DATA:-data/unified_rl/video.jsonl data/unified_rl/image.jsonl data/unified_rl/text.jsonl}
HELD_OUT=${HELD_OUT:-data/unified_rl/heldout.jsonl}
CACHE_DIR=${CACHE_DIR:-cache}
OUTPUT_DIR=${OUTPUT_DIR:-runs/unified_rl_qwen3_vl_8b}
if [ -n "${PLAYGROUND:-}" ]; then
  MODEL=$PLAYGROUND/model DATA=$PLAYGROUND/train.jsonl HELD_OUT=$PLAYGROUND/heldout.jsonl CACHE_DIR=
  OUTPUT_DIR=${RUN:-runs/unified_rl_playground}
fi
read -ra data <<<"$DATA"
read -ra held_out <<<"$HELD_OUT"

flags=(
  --model "$MODEL" --data "${data[@]}" --output_dir "$OUTPUT_DIR" --seed 1
  ${CACHE_DIR:+--cache_dir "$CACHE_DIR"}
  --shuffle                          # over all files: a step then holds all kinds (the published files are mixed beforehand)
  --style think
  # frames and pixels
  --fps 2 --max_frames 128
  --video_min_pixels 262144 --video_max_pixels 262144 --image_min_pixels 262144 --image_max_pixels 1048576
  --max_prompt_tokens 16384 --on_long_prompt skip
  # rollout. Published: four GPUs per engine; see scripts/video_rl_qwen3_vl_8b.sh. Images and videos of one prompt: as many as its row has.
  --group_size 8 --prompts_per_step 512 --max_response_tokens 16384
  --temperature 1.0 --top_p 1.0
  --tensor_parallel 1 --gpu_memory_utilization 0.6 --max_num_batched_tokens 32768 --sleep_level 2
  # reward
  --accuracy_weight 0.9 --format_weight 0.1
  # algorithm. With two updates per step the second is off-policy: its ratios are against log-probs of before the first.
  --algorithm grpo --advantage grpo --advantage_std group
  --policy_loss ppo_clip --clip_low 0.2 --clip_high 0.28 --clip_dual 3.0 --loss_reduction token_mean
  --kl_in none --kl_coef 0
  # update. 8 responses of 16,384 tokens would be 147,456 with their prompt; such groups are cut. Responses of 2,000 on average fit whole.
  --prompts_per_update 256 --update_epochs 1 --token_budget 49152
  --optimizer adamw --learning_rate 1e-6 --lr_schedule constant --warmup_steps 0
  --adam_betas 0.9 0.999 --weight_decay 0.01 --max_grad_norm 1.0
  --park                             # published as offload between phases: fp32 states wait on the host while vLLM samples
  # validation, checkpoints, length. The published presence penalty of 1.5 in validation has no flag here.
  --validate_data "${held_out[@]}" --validate_every 5 --validate_at_start
  --validate_samples 1 --validate_temperature 0.7 --validate_top_p 0.8 --validate_top_k 20
  --epochs 10 --save_every 25 --keep_last 5 --keep_best validate/accuracy
  --phase_limit_s 14400
)
if [ -n "${PLAYGROUND:-}" ]; then
  source scripts/playground_flags.sh
  flags+=("${small[@]}" --prompts_per_update 16)
fi
exec bash scripts/torchrun_nodes.sh train/main.py "${flags[@]}" "$@"
