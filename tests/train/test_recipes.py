"""The recipes: each is planned with its models' real shapes, and checked with small ones."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrl_train import cli
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import RECIPES, load_yaml, settings_file, update
from kdrl_train.method.presets import PRESETS
from kdrl_train.tools.plan import command
from kdrl_train.tools.plan.command import PlanConfig
from tests.train.estimate_cases import QWEN2_7B, write_config

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
QWEN2_1B: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN3_32B = QWEN3_4B | {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        "qwen2",
        QWEN2_1B | {"tie_word_embeddings": False},
    ),
    "Skywork/Skywork-OR1-Math-7B": ("qwen2", QWEN2_7B),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", QWEN2_1B),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", QWEN2_7B),
    "Qwen/Qwen2.5-Math-7B-Instruct": ("qwen2", QWEN2_7B),
    "Qwen/Qwen3-4B": ("qwen3", QWEN3_4B),
    "Qwen/Qwen3-32B": ("qwen3", QWEN3_32B),
}
"""Family and shape of each model, as its config.json on the hub gives them."""
CHAT = (
    "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def read(name: str) -> TrainConfig:
    return update(TrainConfig(), load_yaml(settings_file(f"recipe:{name}")))


def places(config: TrainConfig) -> list[str]:
    """Name the models of a recipe, which a run in a folder with such paths reads from there."""
    model = config.model
    return [place for place in (model.policy, *model.teacher_places.values()) if place != "self"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_read(name: str) -> None:
    text, config = settings_file(f"recipe:{name}").read_text(encoding="utf-8"), read(name)
    for said in ("# Hardware: ", f"--config recipe:{name} ", "# Estimated by `", "# Not run: "):
        assert said in text, said
    assert set(places(config)) <= set(SHAPES)
    assert f"[{name}]({name}.yaml)" in (RECIPES / "README.md").read_text(encoding="utf-8")


def test_recipes_have_the_methods_that_they_name() -> None:
    assert read("paper").method == PRESETS["kdrl_annealed"]
    assert read("self_distillation").method == PRESETS["self_distillation"]
    assert read("one_gpu_lora").model.lora.rank == 16
    assert read("eight_gpus").engine.kind == "vllm"
    assert read("two_teachers").method.of_teacher("math").kd_mask == "wrong"


def test_an_unknown_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--config", "recipe:papre"]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "recipe: and one of eight_gpus," in message
    assert "got recipe:papre; these are files in" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_as_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate that the file states is that of the command that it states."""
    text = settings_file(f"recipe:{name}").read_text(encoding="utf-8")
    stated = re.search(r"plan (.*)`:\n#   ([\d.]+) GB of each GPU at most, ([\d.,]+) s", text)
    assert stated is not None
    for place in places(read(name)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        family, sizes = SHAPES[place]
        write_config(tmp_path / place, family, **sizes)
    monkeypatch.chdir(tmp_path)
    config = cli.parse(PlanConfig(), stated[1].split(), "plan", "plan")
    estimate = command.make_estimate(config)
    assert estimate.fits
    assert estimate.peak / 1e9 == pytest.approx(float(stated[2]), rel=0.1)
    seconds = estimate.to_dict()["seconds"]
    assert seconds == pytest.approx(float(stated[3].replace(",", "")), rel=0.1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "two_teachers" else pytest.mark.slow) for n in NAMES],
)
def test_a_recipe_passes_the_check(
    name: str,
    tmp_path: Path,
    tiny: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With small models of the same families in the places of its own, and such problems."""
    if read(name).model.lora.rank:
        pytest.importorskip("peft")
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = CHAT
    for number, place in enumerate(places(read(name))):
        family, sizes = SHAPES[place]
        tied = sizes["tie_word_embeddings"]
        model = tiny(family, seed=number, tie_word_embeddings=tied, max_position_embeddings=512)
        model.save_pretrained(tmp_path / place)
        talking.save_pretrained(tmp_path / place)
    rows = [
        {"question": f"{a} + {b}?", "problem": f"{a} + {b}?", "answer": str(a + b)}
        | {"solution": f"It is {a + b}.", "teacher": "math" if a else ""}
        for a in range(4)
        for b in range(16)
    ]
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = {
        "data.path": "mine.jsonl",
        "model.device": "cpu",
        "engine.kind": "generate",
        "sampling.max-new-tokens": "16",
        "data.max-prompt-tokens": "256",
        "reward.workers": "1",
    }
    if read(name).data.teacher_template is not None:
        options |= {"data.max-teacher-prompt-tokens": "400"}
    if read(name).eval.data.path:
        options |= {"eval.data.path": "mine.jsonl", "eval.data.max-prompt-tokens": "256"}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert cli.main(["check", "--config", f"recipe:{name}", *words]) == 0, capsys.readouterr().out
    assert "64 problems" in " ".join(capsys.readouterr().out.split())
