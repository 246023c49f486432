"""Describes the commands of `python -m kdrl_train`; imports none of their modules."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: what it does, where its code is, and its main options."""

    help: str
    """What the command does, in one line."""
    module: str
    """Module of kdrl_train with `main(settings)`."""
    settings: str
    """Module and name of the settings class, `main`'s argument."""
    extra: str = "train"
    """Extra of the distribution that brings its packages."""
    lasts: bool = False
    """Whether it runs so long that it says at once that it has started."""
    of_run: bool = False
    """Whether its module has `of_run(run, folder)`, which makes its settings from those of a run:
    --config then takes the config.yaml of a run."""
    options: tuple[str, ...] = ()
    """Keys that --help explains; --help-all explains all. Empty: --help explains all."""
    unread: tuple[str, ...] = ()
    """Keys of its settings that it does not read, as it shares their classes with `train`."""
    rules: str = ""
    """Module and name of the function that says which other settings nothing reads beside the rest,
    and why."""


_MODEL = ("model.policy", "model.teacher", "model.dtype", "model.trust_remote_code")
_TRAIN = (
    "preset", "config", "out", "resume", "steps", "save_every", *_MODEL, "data.path",
    "sampling.prompts_per_step", "sampling.group_size", "sampling.max_new_tokens",
    "engine.kind", "reward.function", "method.kd_coef.initial", "optim.learning_rate",
    "model.lora.rank",
    "eval.data.path", "eval.every", "log.trackers",
)  # fmt: skip
_OF_TRAINING = (
    "self_teacher", "ema_decay", "move_teachers", "gradient_checkpointing", "offload_policy",
    "offload_teacher", "head_backward", "head_threshold", "head_flat", "tensor_parallel",
)  # fmt: skip
"""Settings of the models that training alone reads."""
_OF_TEACHERS = ("data.teacher_column", "data.teacher_template", "data.max_teacher_prompt_tokens")
_RULES = "start.unread.reasons"
COMMANDS = {
    "demo": Command(
        help="small models on a made-up task, trained with KDRL in minutes; needs nothing",
        module="tools.demo",
        settings="tools.demo.DemoConfig",
        lasts=True,
        options=("config", "out", "seed", "problems", "held_out", "steps", "prompts_per_step",
                 "group_size", "learning_rate", "beta", "final_beta", "threads"),
    ),
    "train": Command(
        help="train a policy with a reward and a teacher",
        module="train",
        settings="config.TrainConfig",
        lasts=True,
        options=_TRAIN,
        rules=_RULES,
    ),
    "eval": Command(
        help="measure a saved model: avg@k, pass@k, length",
        module="tools.evaluate",
        settings="config.EvaluateConfig",
        lasts=True,
        of_run=True,
        options=("config", "out", "seed", "samples", "greedy", "max_problems", *_MODEL,
                 "data.path", "sampling.max_new_tokens", "sampling.temperature", "reward.function"),
        unread=(*_OF_TEACHERS, *(f"model.{name}" for name in _OF_TRAINING), "model.lora.merge",
                "sampling.prompts_per_step", "sampling.group_size", "reward.overlong_buffer",
                "reward.overlong_penalty"),
        rules="tools.evaluate.unread",
    ),
    "check": Command(
        help="check a training run before it starts: a table, and exit code 1 if it would fail",
        module="start.preflight",
        settings="config.TrainConfig",
        lasts=True,
        options=_TRAIN,
        rules=_RULES,
    ),
    "replay": Command(
        help="examine the step that stopped a run, completion by completion",
        module="tools.replay",
        settings="tools.replay.ReplayConfig",
        of_run=True,
    ),
    "report": Command(
        help="write one HTML page about runs: curves, differences, samples, events",
        module="tools.report",
        settings="tools.report.ReportConfig",
        extra="report",
    ),
    "plan": Command(
        help="predict memory of each GPU and time of a step from the models' config.json",
        module="tools.plan.command",
        settings="tools.plan.command.PlanConfig",
        options=("gpus", "gpus_per_node", "device", "gpu_memory", "tokens", "prompt_tokens",
                 "json", "preset", "config", *_MODEL, "sampling.prompts_per_step",
                 "sampling.group_size", "sampling.max_new_tokens", "optim.micro_batch_tokens",
                 "model.gradient_checkpointing"),
        rules=_RULES,
    ),
    "serve": Command(
        help="score with a teacher, over HTTP, for trainers on other machines",
        module="tools.serve.command",
        settings="tools.serve.command.ServeConfig",
        extra="serve",
        of_run=True,
        options=("config", "host", "port", "batch_tokens", "queue_size", "request_tokens",
                 "connections", "ssl_certfile", "ssl_keyfile", "model.teacher", "model.dtype",
                 "model.device", "model.trust_remote_code"),
        unread=(*(f"model.{name}" for name in _OF_TRAINING), "model.policy", "model.reference",
                "model.teacher_api", "model.lora"),
    ),
    "sft": Command(
        help="train a small model and its tokenizer on solved problems",
        module="tools.sft",
        settings="tools.sft.SftConfig",
        lasts=True,
        of_run=True,
        options=("config", "out", "seed", "data.path", "solution_column", "model",
                 "trust_remote_code", "steps", "minutes", "batch_tokens", "learning_rate",
                 "architecture.hidden", "architecture.layers"),
        unread=_OF_TEACHERS,
        rules="tools.sft.unread",
    ),
}  # fmt: skip
