"""Tiny models and their tokenizer, built here: nothing is downloaded."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from kdrl_train.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from tests.train import scripted_rewards
from tests.train.estimate_cases import write_models

EXACT = MethodConfig(kd="rkl", kd_coef=ScheduleConfig(initial=0.5, final=0.5))
OTHER = {1, 3}
"""Of five problems in a row those of the second teacher, by their place; each step has both."""
LOOKS_S = 0.01
"""Seconds between two looks of pebble at a pool of verifiers, which is closed at the next look."""
EOS, PAD = "<|endoftext|>", "<|pad|>"  # AutoTokenizer adds the first one to any qwen2 folder


@pytest.fixture(scope="session", autouse=True)
def _verifiers_close_at_once() -> Iterator[None]:
    """Each run closes one: with pebble's 0.1 s between looks it waits most of that time."""
    from pebble.common import CONSTS  # noqa: PLC0415  # the hosts' environments have no pebble

    before, CONSTS.sleep_unit = CONSTS.sleep_unit, LOOKS_S
    yield
    CONSTS.sleep_unit = before


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """256 bytes, an end-of-sequence and a padding token; one token per character of a problem."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {EOS: 0, PAD: 1, **{char: i + 2 for i, char in enumerate(alphabet)}}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD)


@pytest.fixture(scope="session")
def tiny(tokenizer: Any) -> Callable[..., Any]:
    """tiny("qwen2", seed=0, tied=True, hidden=32, **config) -> a random causal LM, evaluating.

    Weights are drawn wide (standard deviation 0.2), so that attention, and hence a leak between
    packed sequences, is far above rounding.
    """

    def make(family: str, *, seed: int = 0, hidden: int = 32, **config: Any) -> Any:
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": hidden // 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        } | config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = transformers.AutoConfig.for_model(family, **settings)
            return transformers.AutoModelForCausalLM.from_config(made).float().eval()

    return make


@pytest.fixture(scope="session")
def folders(
    tokenizer: Any, tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Saved models: a tied Qwen2 `student`, an untied Llama `llama`, two teachers; and `task`."""
    root = tmp_path_factory.mktemp("models")
    models = {
        "student": tiny("qwen2", seed=1, tie_word_embeddings=True),
        "llama": tiny("llama", seed=2, tie_word_embeddings=False),
        "teacher": tiny("llama", seed=3, hidden=48, tie_word_embeddings=False),
        "other_teacher": tiny("qwen2", seed=4, hidden=48, tie_word_embeddings=True),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    task = root / "task.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: root / name for name in models} | {"task": task}


@pytest.fixture
def config(folders: dict[str, Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    """config(out="run", policy="student", teacher="teacher", reward="early_bytes", **fields)."""

    def make(
        out: str = "run",
        policy: str = "student",
        teacher: str = "teacher",
        reward: str = "early_bytes",
        **fields: Any,
    ) -> TrainConfig:
        base = TrainConfig(
            out=tmp_path / out,
            steps=3,
            model=ModelConfig(
                policy=str(folders[policy]), teacher=str(folders[teacher]), device="cpu"
            ),
            data=DataConfig(path=str(folders["task"])),
            sampling=SamplingConfig(prompts_per_step=4, group_size=4, max_new_tokens=8),
            reward=RewardConfig(function=f"{scripted_rewards.__name__}:{reward}", workers=1),
            method=EXACT,
            optim=OptimConfig(learning_rate=1e-3, micro_batch_tokens=64),
        )
        return replace(base, **fields)

    return make


@pytest.fixture
def routed(
    config: Callable[..., TrainConfig], folders: dict[str, Path], tmp_path: Path
) -> Callable[..., TrainConfig]:
    """routed(out="run", second="other_teacher", names=("", "other"), **fields): two teachers.

    names: what the column holds for the problems of the default teacher, and of the other one.
    """
    lines = [json.loads(line) for line in folders["task"].read_text().splitlines()]

    def make(
        out: str = "run",
        second: str = "other_teacher",
        names: Sequence[str] = ("", "other"),
        **fields: Any,
    ) -> TrainConfig:
        task = tmp_path / f"task{'-'.join(names)}.jsonl"
        rows = [line | {"info": {"of": names[i % 5 in OTHER]}} for i, line in enumerate(lines)]
        task.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        base = config(out)
        return replace(
            base,
            model=replace(base.model, teachers={"other": str(folders[second])}),
            data=replace(base.data, path=str(task), teacher_column="info.of"),
            **fields,
        )

    return make


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders that hold a config.json and no weights: see plan_cases."""
    return write_models(tmp_path_factory.mktemp("configs"))
