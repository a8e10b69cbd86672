#!/usr/bin/env bash
# Video reinforcement learning of Qwen3-VL-8B-Instruct with the settings of EasyVideoR1's report: GRPO, clip 0.2 / 0.28, no
# KL, 8 responses to each of 256 prompts, one update per step, learning rate 1e-6, 2 fps, 128 frames, 200 steps on 32 GPUs.
#   MODEL=Qwen3-VL-8B-Instruct DATA=train.jsonl HELD_OUT=heldout.jsonl CACHE_DIR=cache bash scripts/video_rl_qwen3_vl_8b.sh
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/video_rl_qwen3_vl_8b.sh        several nodes: scripts/torchrun_nodes.sh
#   bash scripts/video_rl_qwen3_vl_8b.sh --dry_run                                        the plan; any flag may follow and wins
#   PLAYGROUND=playground/seed0 bash scripts/video_rl_qwen3_vl_8b.sh                      the small twin, any machine
# Before it, once: python data/preprocess.py --data train.jsonl heldout.jsonl --cache_dir cache --model DIR with the frame flags
# below; and scripts/filter_by_pass_rate.py, since the published data were filtered to prompts that the policy solves
# sometimes: 0 < pass rate < 1 over 8 responses.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen3-VL-8B-Instruct}
DATA=${DATA:-data/video_rl/train.jsonl}            # several files: separated by spaces
HELD_OUT=${HELD_OUT:-data/video_rl/heldout.jsonl}
CACHE_DIR=${CACHE_DIR:-cache}
OUTPUT_DIR=${OUTPUT_DIR:-runs/video_rl_qwen3_vl_8b}
if [ -n "${PLAYGROUND:-}" ]; then
  MODEL=$PLAYGROUND/model DATA=$PLAYGROUND/train.jsonl HELD_OUT=$PLAYGROUND/heldout.jsonl CACHE_DIR=
  OUTPUT_DIR=${RUN:-runs/video_rl_playground}
fi
read -ra data <<<"$DATA"
read -ra held_out <<<"$HELD_OUT"

flags=(
  --model "$MODEL" --data "${data[@]}" --output_dir "$OUTPUT_DIR" --seed 42
  ${CACHE_DIR:+--cache_dir "$CACHE_DIR"}
  --no-shuffle                       # the published order is the file's
  --style think
  # frames and pixels
  --fps 2 --max_frames 128
  --video_min_pixels 3136 --video_max_pixels 262144 --image_min_pixels 3136 --image_max_pixels 1048576
  --max_prompt_tokens 20000 --on_long_prompt resample
  # rollout. Published: 0.8 of the memory for vLLM and two GPUs per engine. Here the fp32 states stay beside it, hence 0.6, and
  # ranks of one engine hold the same groups, hence one GPU per engine wherever the model fits (8B in bf16: 16 GiB); with
  # --tensor_parallel 2 add --sequence_parallel 2, so that the two share the update of these groups.
  --group_size 8 --prompts_per_step 256 --max_response_tokens 4096
  --temperature 1.0 --top_p 1.0 --top_k -1
  --tensor_parallel 1 --gpu_memory_utilization 0.6 --max_num_batched_tokens 25000 --sleep_level 2
  # reward
  --accuracy_weight 0.9 --format_weight 0.1
  # algorithm
  --algorithm grpo --advantage grpo --advantage_std group
  --policy_loss ppo_clip --clip_low 0.2 --clip_high 0.28 --clip_dual 3.0 --loss_reduction token_mean
  --kl_in none --kl_coef 0
  # update. A packed group of the longest prompt and 8 longest responses has 20000 + 8 * 4096 = 52768 tokens; a smaller
  # budget cuts such groups and computes their prompt once per piece. 80 GiB GPUs: 32768.
  --prompts_per_update 256 --update_epochs 1 --token_budget 53248
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
