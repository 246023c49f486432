"""Names that TRL and verl have for settings of ours, for messages about a key that there is not."""

from collections.abc import Collection

_TRL = {
    "attn_implementation": "model.attention",
    "bf16": "model.dtype",
    "chat_template_kwargs": "data.template_arguments",
    "dataset_name": "data.path",
    "epsilon": "method.clip_low",
    "epsilon_high": "method.clip_high",
    "eval_steps": "eval.every",
    "lora_r": "model.lora.rank",
    "lora_target_modules": "model.lora.targets",
    "loss_type": "method.token_weights",
    "lr_scheduler_type": "optim.schedule",
    "max_completion_length": "sampling.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_steps": "steps",
    "model_name_or_path": "model.policy",
    "num_generations": "sampling.group_size",
    "output_dir": "out",
    "report_to": "log.trackers",
    "resume_from_checkpoint": "resume",
    "reward_funcs": "reward.functions",
    "save_steps": "save_every",
    "scale_rewards": "method.advantage",
    "teacher_model_name_or_path": "model.teacher",
    "use_rslora": "model.lora.rslora",
    "use_vllm": "engine.kind",
    "vllm_gpu_memory_utilization": "engine.memory_share",
}
_VERL = {
    "clip_ratio_high": "method.clip_high",
    "clip_ratio_low": "method.clip_low",
    "custom_reward_function": "reward.function",
    "default_local_dir": "out",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "entropy_coeff": "method.entropy_coef",
    "gpu_memory_utilization": "engine.memory_share",
    "grad_clip": "optim.max_grad_norm",
    "logger": "log.trackers",
    "lora_alpha": "model.lora.alpha",
    "lora_rank": "model.lora.rank",
    "lr": "optim.learning_rate",
    "lr_warmup_steps": "optim.warmup_steps",
    "max_response_length": "sampling.max_new_tokens",
    "n": "sampling.group_size",
    "param_offload": "model.offload_policy",
    "ppo_max_token_len_per_gpu": "optim.micro_batch_tokens",
    "ppo_mini_batch_size": "optim.updates_per_rollout",
    "project_name": "log.project",
    "prompt_key": "data.prompt_column",
    "resume_mode": "resume",
    "save_freq": "save_every",
    "target_modules": "model.lora.targets",
    "test_freq": "eval.every",
    "total_training_steps": "steps",
    "train_batch_size": "sampling.prompts_per_step",
    "train_files": "data.path",
    "val_files": "eval.data.path",
}
NAMES = _TRL | _VERL
"""The last part of a setting's name in TRL 1.16 or verl 0.9 -> the key of ours that is most like
it; its values may be others. TRL's beta, of the KL to the reference policy, has none: kd_coef is of
that to a teacher."""


def key_of(name: str, keys: Collection[str]) -> str | None:
    """Return the key that somebody means who writes the last part of another one, or None.

    Args:
        name: what was written, without its section.
        keys: all keys of the settings, dotted. One that ends in the name is taken, else one that
            NAMES has; where several end in it, none.
    """
    for goal in (name, NAMES.get(name)):
        if goal is None:
            continue
        if goal in keys:
            return goal
        last = goal.rpartition(".")[2]
        ends = [key for key in keys if key.rpartition(".")[2] == last]
        if len(ends) == 1:
            return ends[0]
    return None
