# Sourced by the launchers for PLAYGROUND=DIR: `small` are flags that make their run the size of a toy. Given after the
# others they win. A learning rate of 1e-6 would not move a policy of a million parameters.
# shellcheck shell=bash disable=SC2034
export HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR PYTHONWARNINGS=ignore RANKS=${RANKS:-2}
small=(
  --style direct --fps 4 --max_frames 8 --video_min_pixels 4096 --video_max_pixels 4096
  --image_min_pixels 4096 --image_max_pixels 4096 --max_prompt_tokens 400 --max_response_tokens 24
  --prompts_per_step 32 --prompts_per_update 32 --token_budget 8192 --max_num_batched_tokens 8192 --kv_cache_gib 0.1
  --learning_rate 5e-4 --reward_workers 1 --validate_max_response_tokens 24 --max_steps 80 --save_every 40 --keep_last 1
)
