"""Trains under DeepSpeed ZeRO-3 as one of several processes: torchrun deepspeed_ranks.py KIND OUT

Rank 0 writes loss and gradient norm of each step into the file OUT, as JSON. KIND: a key of KINDS.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers.trainer_utils import set_seed
from trl import GRPOConfig, GRPOTrainer

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer, patch_trl
from tests.integrations.tiny_trl import (
    losses_and_norms,
    prompts,
    settings,
    tiny_model,
    tiny_tokenizer,
)

ZERO3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # no parameter is so small that every process keeps all of it
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
TRL, OURS = (GRPOConfig, GRPOTrainer), (KdrlConfig, KdrlTrainer)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trl": (TRL, {}),
    "patch_trl": (TRL, {}),
    "one pass": (OURS, {"kd": None}),
    "trl, cispo": (TRL, {"loss_type": "cispo"}),
    "cispo": (OURS, {"kd": None, "loss_type": "cispo"}),
    "rkl": (OURS, {"kd": "rkl", "kd_coef": 0.5}),
}


def reward(completions: list[str], **_: Any) -> list[float]:
    """Reward different words."""
    return [float(len(set(text.split()))) + 0.01 * len(text) for text in completions]


def train(kind: str, zero3: bool) -> Any:
    """Train two steps, and return the trainer."""
    (config, maker), options = KINDS[kind]
    more = {"num_generations": 4, "max_completion_length": 6, "max_steps": 2}
    more |= {"learning_rate": 1e-3, "optim": "adamw_torch", "temperature": 0.8}
    if zero3:
        more["deepspeed"] = ZERO3
    if kind == "patch_trl":
        patch_trl()
    set_seed(0)
    args = config(**settings(Path(tempfile.mkdtemp()), **more | options))
    teacher = {"teacher_model": tiny_model(1)} if options.get("kd") else {}
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(2, 120, 5))
    one = maker(
        model=model,
        args=args,
        reward_funcs=reward,
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        **teacher,
    )
    one.train()
    return one


def main(kind: str, zero3: bool, out: str) -> None:
    """Train, and let the first rank write the file."""
    one = train(kind, zero3)
    assert type(one.model_wrapped).__name__ == (
        "DeepSpeedEngine" if zero3 else "DistributedDataParallel"
    )
    if one.accelerator.is_main_process:
        Path(out).write_text(json.dumps(losses_and_norms(one)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "zero3", sys.argv[3])
