"""patch_trl() in TRL's trainers: SFT, DPO, KTO, GRPO and RLOO learn as with TRL's own head."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers.trainer_utils import set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import add_fused_lm_head

from kdrl_kernels.integrations.trl import patch_trl, unpatch_trl
from tests.integrations.trl_runs import (
    EXPERTS,
    FAMILIES,
    OLD_NAMES,
    arguments,
    family,
    logs,
    parameters,
    prompts,
    reward,
    small_model,
    tokenizer,
)

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    unpatch_trl()


def texts(*fields: str) -> Dataset:
    """Return twelve rows of numbers, more or less of them."""
    rows = [
        {
            name: " ".join(str((row * 7 + place + 3 * spot) % 97) for spot in range(2 + row % 4))
            for place, name in enumerate(fields)
        }
        for row in range(12)
    ]
    return Dataset.from_list(rows)


KINDS = {
    "GRPO": (GRPOConfig, GRPOTrainer, prompts),
    "RLOO": (RLOOConfig, RLOOTrainer, prompts),
    "SFT": (SFTConfig, SFTTrainer, lambda: texts("text")),
    "DPO": (DPOConfig, DPOTrainer, lambda: texts("prompt", "chosen", "rejected")),
    "KTO": (
        KTOConfig,
        KTOTrainer,
        lambda: texts("prompt", "completion").add_column("label", [n % 3 == 0 for n in range(12)]),
    ),
}


def trainer(kind: str, folder: Path, model: Any, **options: Any) -> Any:
    """Return one of TRL's trainers of a model that is saved in the folder."""
    model.save_pretrained(folder / "model")
    config, maker, data = KINDS[kind]
    more: dict[str, Any] = {}
    if kind in ("GRPO", "RLOO"):
        more["reward_funcs"] = reward
        options |= {"beta": 0.1, "gradient_accumulation_steps": 2}
    if kind == "DPO":  # its weights make the gradient small
        options |= {"use_weighting": True, "learning_rate": 2.0}
    args = arguments(config, folder / "run", **options)
    tools = {"train_dataset": data(), "processing_class": tokenizer()}
    return maker(str(folder / "model"), args=args, **tools, **more)


def assert_learns_the_same(kind: str, folder: Path, model: Any, **options: Any) -> None:
    """Train with TRL's head and under the patch; compare weights and logs."""
    results = []
    for patched in (False, True):
        if patched:
            lean = patch_trl()
        set_seed(0)
        one = trainer(kind, folder / str(patched), model, **options)
        before = {name: value.clone() for name, value in parameters(one).items()}
        one.train()
        results.append((parameters(one), logs(one)))
        assert len(logs(one)) == one.args.max_steps
    assert lean.calls >= one.args.max_steps
    assert not lean._told
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert max((results[0][0][name] - before[name]).abs().max() for name in before) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_trainer_learns_the_same(kind: str, tmp_path: Path) -> None:
    assert_learns_the_same(kind, tmp_path, small_model(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", FAMILIES.values(), ids=FAMILIES)
def test_every_head(made: tuple[str, dict[str, Any]], kind: str, tmp_path: Path) -> None:
    assert_learns_the_same(kind, tmp_path, family(made[0], **made[1]), max_steps=2)


QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO"])
@pytest.mark.parametrize(("name", "experts"), [("mixtral", EXPERTS), ("qwen3_moe", QWEN)])
def test_experts(name: str, experts: dict[str, Any], kind: str, tmp_path: Path) -> None:
    assert_learns_the_same(kind, tmp_path, family(name, **experts | BALANCED), max_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"gradient_checkpointing": True}) for kind in ("SFT", "DPO", "GRPO")),
        ("SFT", {"packing": True, "max_length": 32, "padding_free": True}),
        ("SFT", {"loss_type": "dft", "learning_rate": 1.0}),
        ("DPO", {"precompute_ref_log_probs": True}),
    ],
    ids=str,
)
def test_options_of_trl(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert_learns_the_same(kind, tmp_path, small_model(1), **options)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    # torch's, where a graph ends
    "ignore:The .grad attribute of a Tensor that is not:UserWarning"
)
@pytest.mark.parametrize("options", [{}, {"backward": "sketch"}], ids=str)
def test_a_compiled_model_is_compiled_once(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model(1)
    add_fused_lm_head(model)
    compiled = torch.compile(model, backend="eager")
    tokens = torch.arange(6, 24).reshape(2, 9)
    graphs = []
    with patch_trl(**options):
        for call_number in range(6):
            labels = tokens.clone()
            labels[0, : call_number % 3 + 1] = -100
            compiled(input_ids=tokens, labels=labels, fused_lm_head=True).loss.backward()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2]
