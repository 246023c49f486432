"""Compares the memory that `plan` predicts with what two real runs of `train` take on this CPU.

    python -m bench.measures.plan bench/results/plan-cpu

Each run trains random models for two steps, in float32 on one thread, in a process of its own that
gives large blocks back to the system at once. Measured: growth of its resident set's high-water
mark from when its libraries are loaded. Predicted: all of the plan but those libraries.
"""

import ctypes
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from bench.machine import machine_info
from bench.measures.memory import LARGE_BYTES, M_MMAP_THRESHOLD, peak_bytes, reset_peak
from kdrl_train import train
from kdrl_train.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.config_file import to_dict, update
from kdrl_train.method.config import MethodConfig
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.log import read_records
from kdrl_train.start.estimate.memory import by_moment
from kdrl_train.tools.plan.command import LIBRARIES, PlanConfig, make_estimate
from kdrl_train.tools.toy.models import EOS, train_tokenizer

PROMPT = 32
"""Characters (which are tokens) of each prompt, and tokens of each completion."""
POLICY = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16384,
}
TEACHER = POLICY | {"hidden_size": 640, "intermediate_size": 1920, "num_attention_heads": 10}
TEACHER |= {"num_key_value_heads": 5}


@dataclass(frozen=True, kw_only=True, slots=True)
class RealRun:
    """The settings of one run to compare."""

    family: str
    tied: bool
    kd: Any
    checkpointing: bool
    group: int
    """Completions of each of two prompts."""
    row: int
    """Tokens of a pack, two or more packs a step."""


RUNS = {
    "GRPO, tied head, all activations kept": RealRun(
        family="qwen2", tied=True, kd=None, checkpointing=False, group=12, row=1024
    ),
    "exact KL, untied head, layers recomputed": RealRun(
        family="llama", tied=False, kd="rkl", checkpointing=True, group=16, row=512
    ),
}


def write_run(name: str, folder: Path) -> TrainConfig:
    """Write random models, their tokenizer and a task to `folder`; return the run on them."""
    chosen = RUNS[name]
    tokenizer = train_tokenizer(["a"], vocab_size=259)
    sizes = {"policy": (chosen.family, POLICY), "teacher": ("llama", TEACHER)}
    for part, (family, shape) in sizes.items():
        config = transformers.AutoConfig.for_model(
            family,
            **shape,
            tie_word_embeddings=chosen.tied and part == "policy",
            eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
            bos_token_id=None,
            pad_token_id=None,
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / part)
        tokenizer.save_pretrained(folder / part)
    rows = [{"question": f"{i:0{PROMPT}d}", "answer": str(i)} for i in range(8)]
    jsonl.write(folder / "task.jsonl", rows)
    return TrainConfig(
        out=folder / "run",
        steps=2,
        save_every=2,
        model=ModelConfig(
            policy=str(folder / "policy"),
            teacher=str(folder / "teacher"),
            device="cpu",
            gradient_checkpointing=chosen.checkpointing,
        ),
        data=DataConfig(path=str(folder / "task.jsonl"), max_prompt_tokens=PROMPT),
        sampling=SamplingConfig(
            prompts_per_step=2,
            group_size=chosen.group,
            max_new_tokens=PROMPT,
        ),
        reward=RewardConfig(function="exact", workers=1),
        method=MethodConfig(kd=chosen.kd),
        optim=OptimConfig(micro_batch_tokens=chosen.row),
    )


def measure(run: TrainConfig) -> dict[str, Any]:
    """Train in this process; return the bytes grown, and the last step's seconds of each stage."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    before = reset_peak()
    train.main(run, Console(quiet=True))
    row = read_records(run.out)[-1]
    seconds = {key: value for key, value in row.items() if key.startswith("seconds")}
    return {"measured_bytes": peak_bytes() - before, "seconds": seconds}


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Predict and measure one of RUNS, with models written to `folder`."""
    run = write_run(name, folder)
    estimate = make_estimate(update(PlanConfig(device="cpu", launch_us=0.0), to_dict(run)))
    moments = by_moment([term for term in estimate.memory if term.name != LIBRARIES])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        measured = pool.submit(measure, run).result()
    predicted = max(moments.values())
    return measured | {
        "predicted_bytes": predicted,
        "predicted_over_measured": predicted / measured["measured_bytes"],
        "moments": moments,
        "predicted_seconds": {term.name: term.value for term in estimate.time},
    }


def main(out: Path) -> None:
    """Compare all runs, print a line each, and write results.json."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine_info(), "runs": {}}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            comparison = compare(name, Path(folder))
        results["runs"][name] = comparison
        sizes = [comparison[f"{kind}_bytes"] / 1e6 for kind in ("predicted", "measured")]
        ratio = comparison["predicted_over_measured"]
        print(f"{name}: predicted {sizes[0]:,.0f} MB, measured {sizes[1]:,.0f} MB: {ratio:.3f}")
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
