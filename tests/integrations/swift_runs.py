"""Tiny models, a data set, and runs of `swift rlhf` on them, in this process and without network.

A test module asks pytest.importorskip for ms-swift before it imports this.
"""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swift.arguments import RLHFArguments
from swift.pipelines import rlhf_main
from swift.trainers import TrainerFactory
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from kdrl_kernels.integrations.swift import PLUGIN

OFFLINE = {"MODELSCOPE_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TIMES = ("step_time", "elapsed_time", "remaining_time", "train_speed(s/it)", "memory(GiB)")
ALPHABET = sorted(set("Youareahelpfulassistant. 0123456789+=systemuserassistantC\n"))
COMMON = {
    "model_type": "qwen2",
    "template": "qwen",
    "tuner_type": "full",
    "torch_dtype": "float32",
    "check_model": "false",  # whether a hub has a newer one
    "use_hf": "true",
    "split_dataset_ratio": "0",
    "dataset_num_proc": "1",
    "dataloader_num_workers": "0",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "2",
    "max_completion_length": "12",
    "max_steps": "3",
    "logging_steps": "1",
    "optim": "sgd",  # Adam would make a rounding error of a gradient near 0 as large as a step
    "learning_rate": "0.05",
    "lr_scheduler_type": "constant",
    "save_strategy": "steps",
    "save_steps": "3",
    "save_only_model": "true",
    "report_to": "none",
    "seed": "7",
}
KINDS: Mapping[str, Mapping[str, str]] = {
    "grpo": {"reward_funcs": "digits", "num_generations": "4"},
    "gkd": {"teacher_model": "teacher"},
}


@dataclass(frozen=True)
class SwiftRun:
    """Holds what ms-swift logged in each step, and its parameters after the last one."""

    log: list[dict[str, float]]
    parameters: dict[str, Tensor]

    def series(self, name: str) -> list[float]:
        """Return the values of one name in all steps."""
        return [step[name] for step in self.log]


@functools.cache
def tiny_folder() -> Path:
    """Return a folder with student, teacher and data sets, that is kept until the end."""
    folder = Path(_temporary().name)
    tokenizer = _tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        _model(seed, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{b}="},
                {"role": "assistant", "content": str(a * 37 + b)[: 1 + (a + b) % 3]},
            ],
            "teacher_prompt": f"{a}+{b}={a + b}",  # of a teacher that knows more
        }
        for a in range(4)
        for b in range(4)
    ]
    for name, keys in (("data", ["messages"]), ("privileged", ["messages", "teacher_prompt"])):
        lines = [json.dumps({key: row[key] for key in keys}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="swift")  # removed when Python ends


def _tokenizer() -> Any:
    """Return a tokenizer of one token a character and three special ones."""
    vocabulary = {character: i for i, character in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )


def _model(seed: int, tokenizer: Any) -> Any:
    """Return a model that ends a completion after some tokens."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config)


def arguments(output: Path, kind: str, **options: str | None) -> list[str]:
    """Return the arguments of `swift rlhf` for a run; an option that is None is left out.

    Args:
        options: of ms-swift, several values with | between; plugin: any value for the plugin.
    """
    folder = tiny_folder()
    chosen = {**COMMON, **KINDS[kind], "dataset": "data.jsonl", **options}
    words = ["--rlhf_type", kind, "--model", str(folder / "student"), "--output_dir", str(output)]
    words += ["--external_plugins", str(Path(__file__).with_name("swift_reward.py"))]
    words += [PLUGIN] if chosen.pop("plugin", None) else []
    if chosen.get("teacher_model") is not None:
        chosen["teacher_model_type"] = chosen["model_type"]
    for name in ("dataset", "teacher_model"):
        value = chosen.get(name)
        chosen[name] = value if value is None else str(folder / value)
    for name, value in chosen.items():
        words += [] if value is None else [f"--{name}", *value.split("|")]
    return words


def train(output: Path, kind: str, **options: str | None) -> SwiftRun:
    """Run `swift rlhf` in this process, with arguments(kind, **options)."""
    with pristine():
        os.environ.update(OFFLINE)
        rlhf_main(arguments(output, kind, **options))
    return read(output)


def read(output: Path) -> SwiftRun:
    """Read the one run in an output folder."""
    (log,) = output.rglob("logging.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    (weights,) = output.rglob("*model.safetensors")
    return SwiftRun([line for line in lines if "grad_norm" in line], load_file(weights))


@contextmanager
def pristine() -> Iterator[None]:
    """Undo what the plugin changes in ms-swift, and let ms-swift load it again."""
    table, checks = dict(TrainerFactory.TRAINER_MAPPING), dict(vars(RLHFArguments))
    modules, variables = set(sys.modules), dict(os.environ)
    try:
        yield
    finally:
        TrainerFactory.TRAINER_MAPPING = table
        for name, value in checks.items():
            if name.startswith("_check"):
                setattr(RLHFArguments, name, value)
        for name in set(sys.modules) - modules:
            if name.startswith("_swift_external_"):
                del sys.modules[name]
        os.environ.clear()
        os.environ.update(variables)


def assert_equal(ours: SwiftRun, host: SwiftRun, tolerance: float = 1e-5) -> None:
    """Compare all that is logged in each step but times, and the parameters after the last."""
    assert len(ours.log) == len(host.log) == 3
    for step, (mine, theirs) in enumerate(zip(ours.log, host.log, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if name not in TIMES:
                expected = (
                    value
                    if isinstance(value, str)
                    else pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)
                )
                assert mine[name] == expected, (step, name)
    assert ours.parameters.keys() == host.parameters.keys()
    for name, value in host.parameters.items():
        assert (ours.parameters[name] - value).abs().max() <= tolerance, name
