"""What the settings of TRL (`GRPOConfig`), verl and Miles are called here.

An unknown setting that one of them has is answered with its counterpart; docs/settings.md shows the
whole table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counterpart:
    """A setting of the kit and its names elsewhere."""

    ours: str
    """Its dotted name; empty where the kit has no such setting."""
    trl: tuple[str, ...] = ()
    verl: tuple[str, ...] = ()
    """Dotted, as in verl's tree."""
    miles: tuple[str, ...] = ()
    """Flags without their dashes, where they differ from the kit's own name."""
    note: str = ""
    """What differs, or what to do where the kit has no such setting."""

    def named(self, name: str) -> Iterator[str]:
        """Which libraries call it so, as `TRL's num_generations`."""
        for library, names in (("TRL", self.trl), ("verl", self.verl), ("Miles", self.miles)):
            for theirs in names:
                if name in (theirs, theirs.rpartition(".")[2]):
                    yield f"{library}'s {theirs}"


_ACTOR, _ENGINE = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
_MODEL = "actor_rollout_ref.model."
_OPTIMIZER = _ACTOR + "optim."
_EXACT = (
    "true_on_policy_mode",
    "deterministic_mode",
    "sglang_enable_deterministic_inference",
    "sglang_rl_on_policy_target",
)
_REWARD = "give functions to RLSession.start(config, reward=...), several by name with weights"
_MICRO_BATCH = "micro-batches are packed up to so many tokens, which changes nothing but memory"

COUNTERPARTS = (
    Counterpart("name", ("run_name",), ("trainer.experiment_name",)),
    Counterpart("seed", (), ("data.seed",), ("rollout_seed",)),
    Counterpart("model.name", ("model_name_or_path",), (_MODEL + "path",), ("hf_checkpoint",)),
    Counterpart("model.dtype", ("torch_dtype", "bf16", "fp16"), (_ENGINE + "dtype",)),
    Counterpart(
        "model.context_length",
        ("max_prompt_length", "vllm_max_model_length"),
        ("data.max_prompt_length", _ENGINE + "max_model_len"),
        ("rollout_max_context_len",),
        "prompt and response together; prompts are never cut",
    ),
    Counterpart(
        "model.gradient_checkpointing",
        ("gradient_checkpointing_kwargs",),
        (_MODEL + "enable_gradient_checkpointing",),
        (
            "no_gradient_checkpointing", "recompute_granularity", "recompute_method",
            "recompute_num_layers",
        ),
    ),
    Counterpart(
        "model.lora",
        (
            "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora",
            "load_in_4bit",
        ),
        (
            _MODEL + "lora_rank", _MODEL + "lora_alpha", _MODEL + "target_modules",
            _MODEL + "lora_adapter_path",
        ),
        (
            "lora_rank", "lora_alpha", "target_modules", "lora_adapter_path", "lora_type",
            "lora_dropout", "exclude_modules",
        ),
        "a section with PEFT's names: {r: 8, lora_alpha: 16, target_modules: all-linear}",
    ),
    Counterpart("model.compile", ("torch_compile",), (_ACTOR + "use_torch_compile",)),
    Counterpart("training.true_on_policy", (), (), _EXACT),
    Counterpart("data.source", ("dataset_name",), ("data.train_files",), ("prompt_data",)),
    Counterpart("data.eval_source", ("eval_dataset",), ("data.val_files",), ("eval_prompt_data",)),
    Counterpart("data.input_key", (), ("data.prompt_key",)),
    Counterpart(
        "data.chat_template_kwargs",
        ("enable_thinking",),
        ("data.apply_chat_template_kwargs",),
        ("apply_chat_template_kwargs",),
        "such as {enable_thinking: false}",
    ),
    Counterpart("data.filter_overlong_prompts", (), ("data.filter_overlong_prompts",)),
    Counterpart("data.shuffle", ("shuffle_dataset",), (), ("rollout_shuffle",)),
    Counterpart(
        "reward.name",
        ("reward_funcs",),
        ("reward.custom_reward_function.path", "reward_model.reward_manager"),
        ("rm_type", "custom_rm_path"),
        f"a built-in reward; {_REWARD}",
    ),
    Counterpart(
        "reward.weights", ("reward_weights",), (), (), f"of built-in rewards, by name; {_REWARD}"
    ),
    Counterpart("rollout.temperature", (), (), ("rollout_temperature",)),
    Counterpart("rollout.top_p", (), (), ("rollout_top_p",)),
    Counterpart("rollout.top_k", (), (), ("rollout_top_k",)),
    Counterpart(
        "rollout.max_response_len",
        ("max_completion_length",),
        ("data.max_response_length", _ENGINE + "response_length"),
        ("rollout_max_response_len",),
    ),
    Counterpart("rollout.stop", (), (), ("rollout_stop",)),
    Counterpart("rollout.stop_token_ids", (), (), ("rollout_stop_token_ids",)),
    Counterpart("rollout.skip_special_tokens", (), (), ("rollout_skip_special_tokens",)),
    Counterpart(
        "rollout.dynamic_sampling",
        (),
        ("algorithm.filter_groups.enable",),
        ("dynamic_sampling_filter_path",),
    ),
    Counterpart("rollout.over_sampling_batch_size", (), ("data.gen_batch_size",)),
    Counterpart(
        "training.num_rollout",
        ("max_steps", "num_train_epochs"),
        ("trainer.total_training_steps", "trainer.total_epochs"),
        ("num_epoch",),
        "in steps, each of rollout_batch_size prompts",
    ),
    Counterpart(
        "training.rollout_batch_size",
        ("generation_batch_size",),
        ("data.train_batch_size",),
        (),
        "in prompts; TRL counts responses",
    ),
    Counterpart("training.n_samples_per_prompt", ("num_generations",), (_ENGINE + "n",)),
    Counterpart(
        "training.global_batch_size",
        ("steps_per_generation",),
        (_ACTOR + "ppo_mini_batch_size",),
        ("num_steps_per_rollout",),
        "in responses an optimizer step; verl counts prompts, TRL and Miles' flag count the steps",
    ),
    Counterpart("training.epochs_per_rollout", ("num_iterations",), (_ACTOR + "ppo_epochs",)),
    Counterpart(
        "training.max_tokens_per_gpu",
        (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "per_device_eval_batch_size",
        ),
        (
            _ACTOR + "ppo_max_token_len_per_gpu",
            _ACTOR + "ppo_micro_batch_size_per_gpu",
            _ACTOR + "use_dynamic_bsz",
            _ENGINE + "log_prob_micro_batch_size_per_gpu",
        ),
        ("micro_batch_size", "use_dynamic_batch_size"),
        f"{_MICRO_BATCH}; samples an optimizer step are training.global_batch_size",
    ),
    Counterpart("training.learning_rate", (), (_OPTIMIZER + "lr",), ("lr",)),
    Counterpart(
        "training.optimizer", ("optim",), (), (), "adamw or adamw8bit, both torch's arithmetic"
    ),
    Counterpart(
        "training.lr_schedule",
        ("lr_scheduler_type",),
        (_OPTIMIZER + "lr_scheduler_type", _OPTIMIZER + "warmup_style"),
        ("lr_decay_style",),
    ),
    Counterpart(
        "training.warmup_steps",
        ("warmup_ratio",),
        (_OPTIMIZER + "lr_warmup_steps", _OPTIMIZER + "lr_warmup_steps_ratio"),
        ("lr_warmup_iters",),
        "in optimizer steps",
    ),
    Counterpart(
        "training.min_learning_rate", (), (_OPTIMIZER + "min_lr_ratio",), ("min_lr",), "a rate"
    ),
    Counterpart("training.adam_beta1", (), (_OPTIMIZER + "betas",)),
    Counterpart("training.adam_eps", ("adam_epsilon",)),
    Counterpart(
        "training.clip_grad", ("max_grad_norm",), (_ACTOR + "grad_clip", _OPTIMIZER + "clip_grad")
    ),
    Counterpart(
        "training.advantage_estimator",
        ("loss_type", "importance_sampling_level"),
        ("algorithm.adv_estimator", _ACTOR + "policy_loss.loss_mode"),
        (),
        "TRL's loss_type grpo is grpo, dr_grpo is dr_grpo, cispo is cispo, bnpo and dapo are grpo "
        "with training.calculate_per_token_loss: true; importance_sampling_level sequence is gspo",
    ),
    Counterpart(
        "training.grpo_std_normalization",
        ("scale_rewards",),
        ("algorithm.norm_adv_by_std_in_grpo",),
        ("disable_grpo_std_normalization",),
    ),
    Counterpart("training.lambd", (), ("algorithm.lam",)),
    Counterpart("training.critic.learning_rate", (), ("critic.optim.lr",), ("critic_lr",)),
    Counterpart(
        "training.critic.warmup_rollouts",
        (),
        ("trainer.critic_warmup",),
        ("num_critic_only_steps",),
    ),
    Counterpart("training.critic.value_clip", (), ("critic.cliprange_value",), ("value_clip",)),
    Counterpart(
        "training.eps_clip", ("epsilon",), (_ACTOR + "clip_ratio", _ACTOR + "clip_ratio_low")
    ),
    Counterpart("training.eps_clip_high", ("epsilon_high",), (_ACTOR + "clip_ratio_high",)),
    Counterpart("training.eps_clip_c", ("delta",), (_ACTOR + "clip_ratio_c",)),
    Counterpart(
        "training.kl_loss_coef",
        ("beta",),
        (_ACTOR + "use_kl_loss",),
        ("use_kl_loss", "ref_load"),
        "a KL in the loss; above 0 switches it on and loads the reference model",
    ),
    Counterpart(
        "training.kl_coef",
        (),
        ("algorithm.kl_ctrl.kl_coef", "algorithm.use_kl_in_reward"),
        (),
        "a KL in the reward; above 0 switches it on and loads the reference model",
    ),
    Counterpart("training.kl_loss_type", (), ("algorithm.kl_penalty",)),
    Counterpart("training.ref_update_interval", ("sync_ref_model", "ref_model_sync_steps")),
    Counterpart("training.entropy_coef", (), (_ACTOR + "entropy_coeff",)),
    Counterpart(
        "training.calculate_per_token_loss",
        (),
        (_ACTOR + "loss_agg_mode",),
        (),
        "true is verl's token-mean",
    ),
    Counterpart(
        "training.use_rollout_routing_replay",
        (),
        (_ACTOR + "router_replay.mode",),
        (),
        "verl's mode R3; its R2 is training.use_routing_replay",
    ),
    Counterpart(
        "training.use_tis",
        ("vllm_importance_sampling_correction",),
        ("algorithm.rollout_correction.rollout_is",),
    ),
    Counterpart(
        "training.tis_clip",
        ("vllm_importance_sampling_cap",),
        ("algorithm.rollout_correction.rollout_is_threshold", _ACTOR + "tis_imp_ratio_cap"),
    ),
    Counterpart("training.opsm_delta", ("off_policy_mask_threshold",), (), ("use_opsm",)),
    Counterpart(
        "training.optimizer_cpu_offload",
        (),
        (_ACTOR + "fsdp_config.optimizer_offload", _ACTOR + "fsdp_config.param_offload"),
        ("fsdp_cpu_offload", "no_fsdp_cpu_offload"),
    ),
    Counterpart(
        "training.num_trainers",
        (),
        ("trainer.n_gpus_per_node",),
        ("actor_num_gpus_per_node", "actor_num_nodes"),
    ),
    Counterpart(
        "engine.mem_fraction_static",
        ("vllm_gpu_memory_utilization",),
        (_ENGINE + "gpu_memory_utilization",),
        ("sglang_mem_fraction_static",),
    ),
    Counterpart(
        "engine.tensor_parallel",
        ("vllm_tensor_parallel_size",),
        (_ENGINE + "tensor_model_parallel_size",),
        ("rollout_num_gpus_per_engine",),
    ),
    Counterpart(
        "engine.data_parallel",
        (),
        (_ENGINE + "data_parallel_size",),
        ("sglang_data_parallel_size", "sglang_enable_dp_attention"),
    ),
    Counterpart("engine.max_total_tokens", (), (), ("sglang_max_total_tokens",)),
    Counterpart(
        "engine.max_running_requests",
        (),
        (_ENGINE + "max_num_seqs",),
        ("sglang_max_running_requests",),
    ),
    Counterpart("engine.attention_backend", (), (), ("sglang_attention_backend",)),
    Counterpart("engine.kv_cache_dtype", (), (), ("sglang_kv_cache_dtype",)),
    Counterpart(
        "engine.speculative",
        (),
        (),
        (
            "sglang_speculative_algorithm", "sglang_speculative_num_steps",
            "sglang_speculative_eagle_topk", "sglang_speculative_num_draft_tokens",
            "sglang_speculative_draft_model_path",
        ),
        "a section: {algorithm: standalone, draft_model: ...}",
    ),
    Counterpart(
        "training.draft",
        (),
        (),
        ("enable_mtp_training", "mtp_num_layers", "mtp_loss_scaling_factor"),
        "a section: {learning_rate: 1e-6, mtp_loss_scaling_factor: 0.2}, with "
        "engine.speculative.algorithm: mtp",
    ),
    Counterpart("engine.extra", ("generation_kwargs",), (_ENGINE + "engine_kwargs",)),
    Counterpart(
        "memory.sleep",
        ("vllm_enable_sleep_mode",),
        (_ENGINE + "free_cache_engine",),
        ("offload", "offload_train", "offload_rollout", "no_offload_train", "no_offload_rollout"),
    ),
    Counterpart(
        "cluster.colocate",
        ("vllm_mode",),
        ("actor_rollout_ref.hybrid_engine",),
        ("rollout_num_gpus",),
    ),
    Counterpart(
        "evaluation.interval",
        ("eval_steps", "eval_strategy"),
        ("trainer.test_freq",),
        ("eval_interval", "skip_eval_before_train"),
    ),
    Counterpart(
        "evaluation.n_samples_per_prompt",
        ("num_generations_eval",),
        (_ENGINE + "val_kwargs.n",),
        ("n_samples_per_eval_prompt",),
    ),
    Counterpart(
        "evaluation.temperature", (), (_ENGINE + "val_kwargs.temperature",), ("eval_temperature",)
    ),
    Counterpart(
        "checkpoint.interval", ("save_steps", "save_strategy"), ("trainer.save_freq",),
        ("save_interval",),
    ),
    Counterpart(
        "checkpoint.keep_last", ("save_total_limit",), ("trainer.max_actor_ckpt_to_keep",)
    ),
    Counterpart(
        "logging.use_wandb", ("report_to",), ("trainer.logger",), (),
        "or use_tensorboard, use_trackio",
    ),
    Counterpart("logging.dir", (), (), ("wandb_dir",)),
    Counterpart("logging.wandb_project", (), ("trainer.project_name",)),
    Counterpart("logging.wandb_group", (), (), ("disable_wandb_random_suffix",)),
    Counterpart(
        "", ("use_vllm",), (_ENGINE + "name",), (), "the engine is always SGLang"
    ),
    Counterpart(
        "", ("output_dir",), ("trainer.default_local_dir",), ("save",),
        "session.save(path) and `kit run --out FOLDER` say where",
    ),
    Counterpart(
        "", ("min_p", "repetition_penalty"), (), (),
        "engine and trainer would not agree on the probabilities",
    ),
    Counterpart(
        "", ("mask_truncated_completions",), (), (),
        "a reward function sees sample.status, and may mask with sample.loss_mask",
    ),
    Counterpart(
        "", ("logging_steps", "log_completions"), (), (), "every step is logged, with its samples"
    ),
)  # fmt: skip
"""In the order of the settings; last what the kit has no setting for."""

TREES = {"actor_rollout_ref", "algorithm", "trainer", "custom_reward_function", "reward_model"}
"""verl's sections that the kit has not."""


def counterpart(path: list[str]) -> str:
    """What an unknown setting of another library is here; empty where none has it.

    Args:
        path: the setting's sections and name.
    """
    name = path[-1].removeprefix("--").replace("-", "_")
    found = [(entry, [*entry.named(name)]) for entry in COUNTERPARTS]
    answers = [f"{names[0]} {_here(entry)}" for entry, names in found if names]
    if answers:
        return f"{'; or '.join(answers)}. docs/settings.md has the names of TRL, verl and Miles."
    if path[0] in TREES:
        return (
            f"{path[0]} is a section of verl's; docs/settings.md has its settings with their names "
            "here."
        )
    return ""


def _here(entry: Counterpart) -> str:
    note = f" ({entry.note})" if entry.ours and entry.note else ""
    return f"is {entry.ours} here{note}" if entry.ours else f"has no setting here: {entry.note}"
