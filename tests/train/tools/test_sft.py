"""sft and toy models: what is learnt, in which order, and what transformers loads back."""

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdrl_train.config import DataConfig
from kdrl_train.model import kept
from kdrl_train.runfolder import jsonl
from kdrl_train.tools import sft
from kdrl_train.tools.padded_loss import require_same_loss, sft_loss
from kdrl_train.tools.sft import SftConfig
from kdrl_train.tools.sft_batches import SolvedExample, batches, collate, length_groups
from kdrl_train.tools.toy import make_arithmetic
from kdrl_train.tools.toy.models import ArchitectureConfig, make_model, train_tokenizer
from tests.families import LONGROPE, make

FAMILIES = ("qwen2", "qwen3", "llama")
QUIET = Console(quiet=True)
TINY = ArchitectureConfig(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=32)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "train.jsonl"
    jsonl.write(path, make_arithmetic(64, seed=0))
    return path


@pytest.fixture(scope="module")
def tokenizer(task: Path):
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    return train_tokenizer((row["solution"] for row in rows), vocab_size=270)


def config_for(task: Path, **fields) -> SftConfig:
    data = DataConfig(path=str(task), prompt_template="{prompt}\n")
    return SftConfig(**({"data": data, "architecture": TINY, "vocab_size": 270} | fields))


def metrics(folder: Path) -> list[dict[str, float]]:
    text = (folder / "sft_metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


TEXTS = [
    "12*34=408\n#### 408",
    "don't  stop\r\n\r\n x_1 = \\frac{1}{2}  ",
    "Zoë 数学 🙂 ½",
    "",
    " ",
]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_text_round_trips_and_digits_stay_apart(tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    for token in tokenizer.convert_ids_to_tokens(ids):
        assert len(token) == 1 or not any(c in "0123456789" for c in token)
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_merges_are_learnt_up_to_vocab_size(tokenizer) -> None:
    assert 259 < len(tokenizer) <= 270
    assert len(tokenizer("####")["input_ids"]) == 1
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259 .* got 258"):
        train_tokenizer(["a"], vocab_size=258)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_is_the_model_and_the_tokenizer(
    task: Path, tokenizer, tmp_path: Path, family: str, tied: bool
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = ArchitectureConfig(
        family=family, hidden=16, layers=1, heads=2, kv_heads=1, tied=tied, rope_theta=50.0
    )
    config = config_for(
        task,
        out=tmp_path / "model",
        architecture=shape,
        tokenizer=str(tmp_path / "tokenizer"),
        steps=3,
        batch_tokens=256,
    )
    assert sft.main(config, QUIET) == tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == family
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == 50.0
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert len(embedding) == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")  # by the model's type, too
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    fresh = make_model(shape, tokenizer, config.seed)
    assert not torch.equal(model.base_model.norm.weight, fresh.base_model.norm.weight)
    records = metrics(tmp_path / "model")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer"]


def test_a_model_is_a_function_of_its_seed_and_leaves_the_global_one(tokenizer) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    weights = [make_model(TINY, tokenizer, seed).lm_head.weight for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_learns_and_two_runs_are_equal(task: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("a", "b"):
        config = config_for(
            task, out=tmp_path / name, steps=90, batch_tokens=512, learning_rate=1e-2
        )
        sft.main(config, QUIET)
        losses.append([record["loss"] for record in metrics(tmp_path / name)])
    assert losses[0] == losses[1]
    assert losses[0][0] > 5.4  # log(264) nats: all tokens are equally likely
    assert sum(losses[0][-5:]) / 5 < 2.5  # which tokens occur, and in what order


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_gradient_is_that_of_each_example_alone(tokenizer, learn_prompts: bool) -> None:
    model = make_model(TINY, tokenizer, seed=0).double()
    examples = [
        SolvedExample([5, 6, 7], [8, 9, 2]),
        SolvedExample([5], [6, 2]),
        SolvedExample([], [7, 8, 2]),
        SolvedExample([9], [7] * 9),
    ]
    assert len(length_groups(examples)) > 1
    nll, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        ids = torch.tensor(example.prompt + example.solution)
        first = 1 if learn_prompts else max(1, len(example.prompt))
        logits = model(input_ids=ids[None]).logits[0, first - 1 : -1]
        nll = nll + F.cross_entropy(logits, ids[first:], reduction="sum")
        tokens += len(ids) - first
    expected = torch.autograd.grad(nll / tokens, list(model.parameters()))
    loss, counted = sft.backward(model, examples, tokenizer.pad_token_id, learn_prompts)
    assert counted == tokens
    assert loss == pytest.approx((nll / tokens).item(), rel=1e-6)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("phi", {}),
    ],
    ids=str,
)
def test_loss_is_that_of_the_models_own_logits(family: str, settings: dict[str, Any]) -> None:
    model = make(family, **settings).double()
    require_same_loss(model)
    ids = torch.tensor([5, 6, 7, 8, 9, 2])
    batch = collate([SolvedExample([5, 6, 7], [8, 9, 2])], pad=1, learn_prompts=False)
    expected = F.cross_entropy(model(input_ids=ids[None]).logits[0, 2:-1], ids[3:], reduction="sum")
    torch.testing.assert_close(sft_loss(model, batch).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (
            "phi3",
            {
                "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 10},
                "original_max_position_embeddings": 10,
            },
        ),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                "max_position_embeddings": 10,
            },
        ),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_rotary_factors_are_those_of_each_example_alone(
    family: str, settings: dict[str, Any]
) -> None:
    model = make(family, **settings)
    examples = [SolvedExample([], list(range(6, 6 + n))) for n in (12, 9, 11, 10)]
    expected = 0.0
    for example in examples:
        ids = torch.tensor(example.solution)
        kept.forget(model)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        expected += F.cross_entropy(logits, ids[1:], reduction="sum").item()
    for _ in range(2):
        loss, tokens = sft.backward(model, examples, 5, learn_prompts=True)
        assert loss * tokens == pytest.approx(expected, rel=1e-6)


def test_a_model_whose_tokens_see_those_behind_them_is_refused() -> None:
    config = AutoConfig.for_model(
        "xlnet", vocab_size=40, d_model=16, n_layer=1, n_head=2, initializer_range=1.0
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"^model must be causal and .* got XLNetLMHeadModel"):
        require_same_loss(model)


def test_batches_hold_every_example_once_within_the_budget() -> None:
    lengths = [(7 * i) % 40 + 1 for i in range(200)] + [500]
    drawn = batches(lengths, 128, seed=3, epoch=0)
    assert sorted(i for batch in drawn for i in batch) == list(range(201))
    for batch in drawn:
        assert batch == [200] or sum(lengths[i] for i in batch) <= 128
    for left, right in itertools.pairwise(drawn):  # no batch has room for one more
        assert sum(lengths[i] for i in [*left, right[0]]) > 128
    assert batches(lengths, 128, seed=3, epoch=0) == drawn
    assert batches(lengths, 128, seed=3, epoch=1) != drawn
    assert batches(lengths, 128, seed=4, epoch=0) != drawn


def test_length_groups_hold_every_example_once_with_little_padding() -> None:
    examples = [SolvedExample([i], [0] * ((7 * i) % 40 + 1)) for i in range(60)]
    groups = length_groups(examples)
    assert sorted(one.prompt[0] for group in groups for one in group) == list(range(60))
    for group in groups:
        assert len(group) * max(map(len, group)) <= 1.25 * sum(map(len, group))
    assert 1 < len(groups) < 12
    assert len(length_groups([examples[0]] * 9)) == 1


def test_learning_rate_by_hand(task: Path) -> None:
    config = config_for(task, learning_rate=1.0, warmup_steps=4, steps=100)
    assert sft.learning_rate_at(config, 0, 0.0) == pytest.approx(0.25)
    assert sft.learning_rate_at(config, 3, 0.0) == pytest.approx(1.0)
    assert sft.learning_rate_at(config, 50, 0.5) == pytest.approx(0.525)  # 0.05 + 0.95 / 2
    assert sft.learning_rate_at(config, 99, 1.0) == pytest.approx(0.05)


def test_minutes_end_a_run_early(task: Path, tmp_path: Path) -> None:
    config = config_for(task, out=tmp_path / "m", steps=10**6, minutes=0.01, batch_tokens=256)
    sft.main(config, QUIET)
    records = metrics(tmp_path / "m")
    assert 1 <= len(records) < 10**6
    assert records[-1]["seconds"] < 30
    assert records[-1]["learning_rate"] < config.learning_rate


def test_a_loss_that_is_not_finite_stops_before_the_step(task: Path, tokenizer) -> None:
    model = make_model(TINY, tokenizer, seed=0)
    with torch.no_grad():
        model.lm_head.weight[4] = torch.inf
    before = model.base_model.norm.weight.clone()
    config = config_for(task, steps=2)
    examples = [SolvedExample([5], [6, tokenizer.eos_token_id])]
    with pytest.raises(FloatingPointError, match=r"must be finite, got .* at step 0; lower learn"):
        sft.fit(model, examples, tokenizer.pad_token_id, config, QUIET)
    assert torch.equal(model.base_model.norm.weight, before)


def test_examples_are_the_prompts_of_train_and_the_solutions(task: Path, tokenizer) -> None:
    config = config_for(task)
    solutions = sft.read_solutions(config)
    examples = sft.encode_examples(tokenizer, solutions, config, config.architecture.max_positions)
    first = make_arithmetic(1, seed=0)[0]
    assert len(examples) == 64
    assert tokenizer.decode(examples[0].prompt) == first["question"] + "\n"
    assert tokenizer.decode(examples[0].solution) == first["solution"] + tokenizer.eos_token
    assert solutions[0][0].gold == first["answer"]


def test_over_long_prompts_are_left_out_and_counted(task: Path, tokenizer, tmp_path: Path) -> None:
    config = config_for(task, out=tmp_path / "out", steps=1)
    lengths = [
        len(one.prompt)
        for one in sft.encode_examples(tokenizer, sft.read_solutions(config), config, 256)
    ]
    median = sorted(lengths)[32]
    short = replace(config, data=replace(config.data, max_prompt_tokens=median))
    kept = sum(length <= median for length in lengths)
    out = io.StringIO()
    own_tokenizer = tmp_path / "tokenizer"
    tokenizer.save_pretrained(own_tokenizer)
    sft.main(replace(short, tokenizer=str(own_tokenizer)), Console(file=out, width=200))
    printed = out.getvalue()
    assert f"{64 - kept} of 64 examples are left out: their prompts have more than" in printed
    assert f"{kept} examples\n" in printed
    none = replace(config, data=replace(config.data, max_prompt_tokens=1))
    with pytest.raises(ValueError, match=r"at least one example, got 1, and 64 longer prompts"):
        sft.encode_examples(tokenizer, sft.read_solutions(config), none, 256)


def test_an_example_too_long_is_named(task: Path, tokenizer) -> None:
    config = config_for(task)
    with pytest.raises(ValueError, match=r"max_positions must be .* of train.jsonl:\d+, got 20"):
        sft.encode_examples(tokenizer, sft.read_solutions(config), config, longest=20)


def test_a_tokenizer_without_an_end_is_refused(task: Path) -> None:
    tokenizer, config = train_tokenizer(["a"], 259), config_for(task)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer must have an eos_token, got none: set it"):
        sft.encode_examples(tokenizer, sft.read_solutions(config), config, 256)


def test_training_continues_a_model(task: Path, tmp_path: Path) -> None:
    first = sft.main(config_for(task, out=tmp_path / "first", steps=3), QUIET)
    small = {"learning_rate": 1e-9, "weight_decay": 0.0, "steps": 1}
    settings = config_for(task, out=tmp_path / "second", model=str(first), **small)
    out = io.StringIO()
    second = sft.main(settings, Console(file=out, width=300))
    assert "nothing reads vocab_size = 270, architecture.hidden = 16, " in out.getvalue()
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (first, second)
    )
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="tokenizer must be None beside a model"):
        replace(settings, tokenizer=str(first))


def test_bad_settings_are_named(task: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out must be a new folder, got .* remove it"):
        sft.main(config_for(task, out=tmp_path), QUIET)
    with pytest.raises(ValueError, match=r"solution_column must be a column of train.jsonl:1, .*"):
        sft.main(config_for(task, out=tmp_path / "x", solution_column="proof"), QUIET)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"hidden must be a multiple of 2 \* heads .* heads = 4"):
        ArchitectureConfig(hidden=100)
    with pytest.raises(ValueError, match="kv_heads must divide heads = 4, got kv_heads = 3"):
        ArchitectureConfig(kv_heads=3)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        SftConfig(steps=0)
    with pytest.raises(ValueError, match="minutes must be greater than 0, got 0"):
        SftConfig(minutes=0)
    tokenizer_without = train_tokenizer(["a"], 259)
    tokenizer_without.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an eos_token, got none"):
        make_model(TINY, tokenizer_without, seed=0)
