"""KdrlTrainer with a policy and a teacher that see images: a small LLaVA."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("PIL")

from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer
from kdrl_train.tools.toy.models import train_tokenizer
from tests.integrations.full_logits import BETA, FullLogitsTrainer
from tests.integrations.trl_runs import OLD_NAMES, arguments, assert_same_runs

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@cache
def processor() -> Any:
    """Return a processor whose images are 5 tokens: 2 · 2 patches and one of the class."""
    tokenizer = train_tokenizer(("What is it?",), 262)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@cache
def _model(seed: int, hidden: int) -> Any:
    tokenizer = processor().tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    ids["bos_token_id"] = tokenizer.bos_token_id
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        **ids,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    ids["eos_token_id"] = list(range(2, 260, 4))
    model.generation_config = GenerationConfig(**ids)
    return model


def model(seed: int, hidden: int = 32) -> Any:
    """Make a small LLaVA, the same one for the same arguments."""
    return copy.deepcopy(_model(seed, hidden))


def questions() -> Dataset:
    """Return questions of two lengths about images of one colour."""
    rows = []
    for number in range(4):
        content = "What is it?" * (1 + number % 2)
        image = Image.new("RGB", (16, 16), (60 * number, 255 - 60 * number, 30))
        rows.append({"prompt": [{"role": "user", "content": content}], "image": image})
    return Dataset.from_list(rows)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Judge completions by the sum of their bytes."""
    return [sum(one[0]["content"].encode()) % 17 / 16 for one in completions]


def train(kind: Any, args: Any, **options: Any) -> Any:
    trainer = kind(
        model=model(1),
        args=args,
        train_dataset=questions(),
        processing_class=processor(),
        reward_funcs=reward,
        **options,
    )
    trainer.train()
    return trainer


def assert_same_training(ours: Any, theirs: Any) -> None:
    """Compare loss, gradient norm, entropy and weights, to float32's rounding."""
    names = ("loss", "grad_norm", "entropy")
    assert_same_runs(ours, theirs, dict(model(1).named_parameters()), names)


def test_without_a_teacher_it_is_grpo(tmp_path: Path) -> None:
    ours = train(KdrlTrainer, arguments(KdrlConfig, tmp_path, kd=None))
    assert_same_training(ours, train(GRPOTrainer, arguments(GRPOConfig, tmp_path)))


def test_the_teacher_sees_the_images(tmp_path: Path) -> None:
    args = arguments(KdrlConfig, tmp_path, kd="rkl", kd_coef=BETA)
    ours = train(KdrlTrainer, args, teacher_model=model(2, 48))
    args = arguments(GRPOConfig, tmp_path)
    assert_same_training(ours, train(FullLogitsTrainer, args, teacher=model(2, 48)))
