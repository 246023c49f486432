"""Trains under DeepSpeed ZeRO-3 as one of several processes: torchrun deepspeed_ranks.py KIND OUT

Rank 0 writes loss and gradient norm of each step into the file OUT, as JSON. KIND: a key of KINDS.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.trainer_utils import set_seed
from trl import GRPOConfig, GRPOTrainer

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer, patch_trl
from tests.integrations.trl_runs import arguments, logs, small_model, trainer_of

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


def train(kind: str, zero3: bool) -> Any:
    """Train two steps, and return the trainer."""
    (config, maker), options = KINDS[kind]
    more: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "optim": "adamw_torch"}
    if zero3:
        more["deepspeed"] = ZERO3
    if kind == "patch_trl":
        patch_trl()
    set_seed(0)
    model, teacher = small_model(1), small_model(2)  # whole: ZeRO-3 begins with the arguments
    args = arguments(config, Path(tempfile.mkdtemp()), **more | options)
    one = trainer_of(maker, args, model, **{"teacher_model": teacher} if options.get("kd") else {})
    one.train()
    return one


def main(kind: str, zero3: bool, out: str) -> None:
    """Train, and let the first rank write the file."""
    one = train(kind, zero3)
    assert type(one.model_wrapped).__name__ == (
        "DeepSpeedEngine" if zero3 else "DistributedDataParallel"
    )
    if one.accelerator.is_main_process:
        steps = [(record["loss"], record["grad_norm"]) for record in logs(one)]
        Path(out).write_text(json.dumps(steps))
    dist.barrier()  # else one that ends first has been seen to abort at its exit
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "zero3", sys.argv[3])
