#!/usr/bin/env bash
# The settings of 'qwen3-0.6b-gsm8k' for Miles, written by `kit export miles`.
# Run it where Miles is installed, in its own image as a rule.
#
# Settings without a counterpart:
#   data.system_prompt: it belongs into the rows; `--data FOLDER` puts it there (here Think step by step. End with #### and the number.)
#   memory.device_gib: Miles has no memory plan; --sglang-mem-fraction-static shares a card (here 24.0)
#   evaluation.max_prompts: name a slice of the file, such as held_out.jsonl@[0:512] (here 512)
set -euo pipefail

MILES_DIR="${MILES_DIR:-/root/miles}"
NUM_GPUS=1
MODEL=Qwen/Qwen3-0.6B
PROMPT_DATA="$PWD"/data/gsm8k/train.jsonl
EVAL_DATA=/data/gsm8k/test.jsonl
SAVE="$PWD"/outputs/checkpoints

if [[ ! -d "$MODEL" ]]; then  # --ref-load has to be a directory
   MODEL="$(hf download --quiet "$MODEL")"
fi

CKPT_ARGS=(
   --train-backend fsdp
   --ref-load "$MODEL"
   --hf-checkpoint "$MODEL"
   --save "$SAVE"
   --save-interval 10
)

ROLLOUT_ARGS=(
   --prompt-data "$PROMPT_DATA"
   --input-key question
   --label-key answer
   --apply-chat-template
   --rollout-shuffle
   --seed 0
   --rollout-seed 0
   # needs the kit where Miles runs: pip install --no-deps its folder
   --custom-rm-path kit.miles.rewards.gsm8k
   --num-rollout 100
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --num-steps-per-rollout 1
   --rollout-temperature 1.0
   --rollout-max-response-len 1024
   --rollout-stop '

Question:'
)

EVAL_ARGS=(
   --eval-prompt-data test "$EVAL_DATA"
   --eval-interval 10
   --eval-temperature 0.0
)

GRPO_ARGS=(
   # training.advantage_estimator: Miles has no rloo; grpo is the nearest
   --advantage-estimator grpo
   --eps-clip 0.2
   --eps-clip-high 0.28
   --use-kl-loss
   --kl-loss-coef 0.001
   --kl-loss-type k3
   --entropy-coef 0.0
)

OPTIMIZER_ARGS=(
   --lr 1e-06
   --lr-decay-style constant
   --adam-beta1 0.9
   --adam-beta2 0.98
   --weight-decay 0.0
)

PERF_ARGS=(
   --num-gpus-per-node "$NUM_GPUS"
   --optimizer adam
   --actor-num-nodes 1
   --actor-num-gpus-per-node "$NUM_GPUS"
   # training.max_tokens_per_gpu: left open it is 16384
   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
   --colocate
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 1
   --sglang-chunked-prefill-size 4096
)

LOG_ARGS=(
   --use-wandb
   --wandb-group 'it'"'"'s first'
   --disable-wandb-random-suffix
)

# A cluster that runs already is joined: leave this line out.
ray start --head --num-gpus "$NUM_GPUS" --disable-usage-stats

ray job submit --address="http://127.0.0.1:8265" \
   --runtime-env-json='{"env_vars": {"PYTHONPATH": "/root/Megatron-LM/", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}}' \
   -- python3 "$MILES_DIR/train.py" \
   "${CKPT_ARGS[@]}" \
   "${ROLLOUT_ARGS[@]}" \
   "${EVAL_ARGS[@]}" \
   "${GRPO_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${SGLANG_ARGS[@]}" \
   "${LOG_ARGS[@]}"
