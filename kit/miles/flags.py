"""Flags that Miles takes and the kit does without, and why; tells them from misspelt ones."""

from __future__ import annotations

_ARCHITECTURE = """
    num-layers hidden-size ffn-hidden-size num-attention-heads group-query-attention
    num-query-groups kv-channels swiglu normalization norm-epsilon layernorm-epsilon
    use-rotary-position-embeddings rotary-base rotary-percent rotary-scaling-factor
    position-embedding-type disable-bias-linear add-qkv-bias add-bias-linear qk-layernorm
    vocab-size make-vocab-size-divisible-by padded-vocab-size max-position-embeddings
    untie-embeddings-and-output-weights apply-layernorm-1p attention-output-gate
    num-experts moe-layer-freq moe-ffn-hidden-size moe-router-topk
    moe-router-score-function moe-router-pre-softmax moe-router-dtype moe-router-load-balancing-type
    moe-router-enable-expert-bias moe-router-bias-update-rate moe-router-topk-scaling-factor
    moe-router-num-groups moe-router-group-topk moe-shared-expert-intermediate-size
    moe-shared-expert-gate moe-shared-expert-overlap moe-grouped-gemm moe-permute-fusion
    moe-aux-loss-coeff moe-token-drop-policy moe-token-dispatcher-type
    multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
    rotary-interleaved spec model-name extra-high-precision-layers-hf
    extra-high-precision-layers-megatron custom-model-provider-path linear-attention-backend
    seq-length
"""
_PARALLEL = """
    tensor-model-parallel-size sequence-parallel pipeline-model-parallel-size
    context-parallel-size expert-model-parallel-size expert-tensor-parallel-size
    decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
    num-layers-per-virtual-pipeline-stage use-distributed-optimizer overlap-grad-reduce
    overlap-param-gather overlap-cpu-optimizer-d2h-h2d use-precision-aware-optimizer
    distributed-backend distributed-timeout-minutes dp-replicate-size indep-dp
    delay-split-train-data-by-dp allgather-cp fsdp-state-dict-cpu-offload
    no-fsdp-state-dict-cpu-offload fsdp-cpu-backend
    critic-num-nodes
    critic-num-gpus-per-node cluster-backend worker-comm-backend deploy-component
    deploy-instance-id init-expected-num-cells trainer-controller-addrs inference-controller-addr
"""
_AS_THE_KIT = """
    train-backend num-gpus-per-node optimizer bf16 actor-num-nodes
    attention-dropout hidden-dropout accumulate-allreduce-grads-in-fp32
    attention-softmax-in-fp32 attention-backend
    attn-implementation use-dynamic-batch-size megatron-to-hf-mode balance-data balance-by-flops
    micro-batch-size load ref-load save variable-seq-lengths no-rope-fusion loss-type
    use-flash-attn transformer-impl override-opt-param-scheduler override-opt_param-scheduler
    disable-wandb-random-suffix use-rollout-entropy
"""
_SECRET = "wandb-key"
_OTHER = """
    run-uuid offload-rollout-level offload-train-target offload-train-disk-dir
    offload-train-disk-chunk-mb stream-optimizer-state-to-disk stream-optimizer-state-moment-dtype
    clear-quantized-weight-workspaces-on-offload colocate-memory-peak-device qkv-format
    miles-dsa-topk-backend true-on-policy-mode recompute-logprobs-via-prefill train-env-vars
    train-memory-margin-bytes debug-skip-weight-update debug-disable-optimizer
    rematerialize-param-from-master-weight check-rematerialize-param-from-master-weight
    dsa-attention-backend recompute-loss-function log-probs-chunk-size low-memory-resume
    mfu-peak-tflops rollout-function-path fully-async namespaced-radix-cache rollout-max-prompt-len
    object-store-backend
    mooncake-store-init-kwargs mooncake-replica-num rollout-submission-granularity
    max-weight-staleness async-max-concurrent-samples async-data-buffer-capacity-factor
    async-unused-samples-handler custom-async-data-buffer-path custom-generate-function-path
    custom-rollout-log-function-path custom-eval-rollout-log-function-path buffer-filter-path
    update-weights-interval pause-generation-mode keep-old-actor rollout-data-postprocess-path
    pin-rollout-manager-to-head rollout-external-engine-addrs rollout-external-router-pd
    custom-inference-engine-provider-path update-weight-transfer-mode update-weight-disk-dir
    update-weight-local-checkpoint-dir update-weight-delta-encoding update-weight-delta-checksum
    custom-update-weight-post-write-path p2p-transfer-num-workers p2p-transfer-timeout
    use-fault-tolerance ft-components rollout-health-check-interval rollout-health-check-timeout
    rollout-health-check-first-wait api-server-host api-server-port mini-ft-controller-enable
    mini-ft-controller-poll-interval mini-ft-controller-resume-delay debug-exit-after-rollout
    num-epoch disable-rollout-global-dataset data-source-path
    chat-template-path multimodal-keys tool-key start-rollout-id allow-partial-train-step
    log-probs-max-tokens-per-gpu eval-function-path eval-config eval-input-key eval-label-key
    eval-tool-key eval-top-p eval-top-k eval-max-response-len eval-max-prompt-len
    eval-min-new-tokens eval-max-context-len eval-num-gpus eval-num-gpus-per-engine eval-hf-dir
    eval-max-in-flight eval-overflow-policy eval-keep-snapshots ref-ckpt-step async-save
    no-save-optim save-hf save-trigger-sentinel custom-megatron-post-save-hook-path critic-load
    critic-save critic-lr-warmup-iters custom-loss-function-path
    disable-compute-advantages-and-returns use-unbiased-kl disable-rewards-normalization
    observe-training-entropy get-mismatch-metrics reset-optimizer-states skip-actor-forward-only
    custom-tis-function-path custom-pg-loss-reducer-function-path use-indexer-replay
    use-rollout-indexer-replay use-opd opd-type
    opd-kl-coef opd-log-prob-top-k opd-top-k-strategy opd-reward-weight-mode opd-topk-per-position
    opd-teacher-urls opd-teacher-key opd-teacher-load opd-teacher-ckpt-step use-miles-router
    miles-router-timeout miles-router-max-connections miles-router-health-check-failure-threshold
    log-multi-turn log-passrate log-reward-category log-correct-samples use-mlflow
    mlflow-tracking-uri mlflow-experiment-name mlflow-run-name mlflow-run-id use-prometheus
    prometheus-port prometheus-run-name use-trackio trackio-project trackio-run-name trackio-group
    trackio-dir trackio-server-url trackio-space-id save-debug-rollout-data
    save-debug-trajectory-data load-debug-rollout-data load-debug-rollout-data-subsample
    debug-rollout-only debug-train-only save-debug-train-data save-debug-event-data dump-details
    dumper-enable dumper-dir memory-snapshot-dir memory-snapshot-num-steps memory-snapshot-path
    record-memory-history profile-target memory-recorder use-pytorch-profiler profile-step-start
    profile-step-end tensorboard-dir check-weight-update-equal check-weight-update-selector
    check-weight-update-skip-list check-weight-update-allow-quant-error save-local-weight-checksum
    enable-event-analyzer enable-sample-ownership-checker enable-witness witness-buffer-size
    env-report env-report-interval-seconds debug-deterministic-collective http-proxy
    use-distributed-post reward-key eval-reward-key group-rm rm-url custom-reward-post-process-path
    custom-convert-samples-to-train-data-path rollout-buffer-url fetch-trajectory-retry-times
    min-batch-collection-ratio rollout-task-type loss-mask-type data-pad-size-multiplier
    rollout-sample-filter-path rollout-all-samples-process-path disable-rollout-trim-samples
    use-dynamic-global-batch-size freeze-indexer custom-megatron-init-path
    custom-megatron-before-log-prob-hook-path custom-megatron-before-train-step-hook-path
    prefill-num-servers ci-test ci-disable-kl-checker
    ci-disable-logprobs-checker ci-disable-weight-update-checker ci-metric-checker-key
    ci-metric-checker-threshold use-session-server session-server-workers session-server-ip
    session-server-port tito-model custom-config-path megatron-config config fp16
    disable-fp32-master deterministic-mode warmup-ratio lr-warmup-init lr-warmup-fraction
    lr-decay-iters lr-wsd-decay-iters lr-wsd-decay-style use-checkpoint-lr-scheduler
    override-lr-scheduler wandb-run-name sglang-server-concurrency sglang-router-ip
    sglang-router-port sglang-router-policy sglang-router-request-timeout-secs sglang-config
    lora-sync-from-tensor lora-base-cpu-backup lora-train-only check-lora-weight-equal
    experts-shared-outer-loras multi-lora-n-adapters
    data-parallel-sharding-strategy no-load-optim no-load-rng no-save-rng finetune ckpt-format
    dist-ckpt-strictness train-iters exit-duration-in-mins log-interval
"""

READ_FROM_CHECKPOINT = "the kit reads the architecture from the checkpoint"
OWN_WAY = "the kit shards with FSDP2 and places its processes itself"
SAME = ""
"""What the flag asks for is what the kit does; there is nothing to tell."""
KEY = "secrets are no settings: `wandb login`, or WANDB_API_KEY"
NONE = "no counterpart in the kit"

REASONS: dict[str, str] = {
    f"--{name}": reason
    for names, reason in (
        (_OTHER, NONE),
        (_ARCHITECTURE, READ_FROM_CHECKPOINT),
        (_PARALLEL, OWN_WAY),
        (_SECRET, KEY),
        (_AS_THE_KIT, SAME),
    )
    for name in names.split()
}
"""Why there is no setting for a flag, by the flag."""

_NOT_PASSED = """
    model_path config trust_remote_code random_seed enable_memory_saver tp_size port nnodes
    node_rank dist_init_addr gpu_id_step base_gpu_id nccl_port skip_server_warmup
    enable_return_routed_experts
"""
NOT_PASSED = frozenset(_NOT_PASSED.split())
"""Fields of `sglang.ServerArgs` that Miles sets itself and has no flag for."""
