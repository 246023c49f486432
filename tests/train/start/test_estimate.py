"""The estimate of memory: terms by hand, exact parameter counts, what autograd keeps, trends."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kdrl_train.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.attention import NAME, packed_arguments
from kdrl_train.model.load import checkpoint_activations
from kdrl_train.start.estimate.case import Case, Placement
from kdrl_train.start.estimate.memory import by_moment, memory_terms
from kdrl_train.start.estimate.shapes import read_shape
from tests.train.estimate_cases import (
    ATTENTION,
    LLAMA_8B,
    POLICY,
    QWEN2_7B,
    SPECIAL,
    case_of,
    sharded_case,
    values,
    write_config,
)


def test_one_process_in_float32_by_hand(models: dict[str, str]) -> None:
    """P = 2 (72 + 36 + 36 + 64 + 384 + 16) + 2·256 + 8 = 1,736; packs of 64 tokens."""
    assert values(case_of(models, "untied")) == {
        "weights, float32": 4 * 1736,
        "gradients, float32": 4 * 1736,
        "AdamW moments": 8 * 1736,
        "AdamW temporaries": 8 * 256,
        "the embedding's gradient": 4 * 256,
        "last norm, hidden states": 64 * 8 * 16,
        "a layer's backward": 64 * 4 * (2 * 16 + 2 * 8),
        "activations": 2 * 64 * (12 * 16 + 4 * (5 * 8 + 4 * 16)),
        "workspace of the head": 64 * (64 * 4 + 8 * 4 + 8 * 4) + 64 * 6 * 64 * 4,
        "dX, float32": 4 * 64 * 8,
        "dW accumulator, float32": 4 * 32 * 8,
        "keys and values of the prompts": 4 * 6 * (2 * 4 * 2 * 4),
        "a layer of the prompts": 4 * 6 * (3 * 4 * (16 + 8)),
        "mask of padded prompts": 5 * 4 * 6 * 6,
        "keys and values": 4 * 16 * (2 * 4 * 2 * 4),
        "a layer's keys, copied to grow": 4 * 16 * (4 * 4),
        "logits of a token": 20 * 4 * 32,
    }


def test_four_gpus_in_bfloat16_by_hand(models: dict[str, str]) -> None:
    """Policy 2·608 + 256 + 8 = 1,480, teacher 3·1,128 + 2·480 + 12 = 4,356; packs of 32 tokens."""
    assert values(sharded_case(models)) == {
        "weights, float32": 1480,
        "gradients, float32": 1480,
        "AdamW moments": 2960,
        "AdamW temporaries": 1480,
        "gathered layers": 2 * 2 * 608,
        "gathered root": 2 * 264,
        "a layer's gradient, whole": 6 * 608,
        "the head's gradient, whole": 2 * 256,
        "the root's gradient, whole": 6 * 264,
        "last norm, hidden states": 32 * 8 * 10,
        "a layer's backward": 32 * 2 * 48,
        "inputs of the layers": 2 * 32 * 2 * 8,
        "one layer, recomputed": 32 * (8 * 16 + 2 * (ATTENTION + 4 * 16)),
        "workspace of the head": 8192 * 2 * 64 * 4 + 32 * ((8 + 12) * 2 + 8 * 4),
        "dX, float32": 4 * 32 * 8,
        "dW accumulator, float32": 4 * 32 * 8,
        "teacher": 2 * 4356 / 4,
        "teacher's hidden states": 2 * 32 * 12,
        "a layer of the teacher": 32 * 3 * 2 * (20 + 12),
        "teacher's layers, gathered": 2 * (2 * 1128 + 972),
        "teacher's head, gathered": 2 * 480,
        "keys and values of the prompts": 2 * 6 * (2 * 2 * 2 * 4),
        "a layer of the prompts": 2 * 6 * (3 * 2 * (16 + 8)),
        "mask of padded prompts": 3 * 2 * 6 * 6,
        "keys and values": 2 * 16 * (2 * 2 * 2 * 4),
        "a layer's keys, copied to grow": 2 * 16 * (2 * 4),
        "logits of a token": 20 * 2 * 32,
        "copy of the policy that samples": 2 * 1480,
    }


@pytest.mark.parametrize(
    ("method", "streams"),
    [(MethodConfig(), 1), (MethodConfig(kd_baseline="kl"), 2), (MethodConfig(kd="reward"), 1)],
)
def test_a_baseline_holds_the_teachers_logits(
    models: dict[str, str], method: MethodConfig, streams: int
) -> None:
    case = sharded_case(models)
    case = replace(case, run=replace(case.run, method=method))
    assert case.chunk_plan(32).geometry.streams == streams
    workspace = values(case)["workspace of the head"]
    logits = 8192 * streams * 64 * 4  # the buffer of any number of tokens
    assert workspace == logits + 32 * ((8 + 12) * 2 + 8 * 4)


def test_a_sketch_holds_lists_in_place_of_dx_and_dw(models: dict[str, str]) -> None:
    """Of an entry a column, int32, and a value, float32; of 64 and 32 tokens where each begins.

    Of a token that is too flat its dL/dlogits: 32 columns in the compute dtype. On a GPU a chunk of
    32 tokens has room for 18 entries each, of 16 bytes: 1 / threshold and two.
    """
    for case, tokens, b in ((case_of(models, "untied"), 64, 4), (sharded_case(models), 32, 2)):
        run = replace(case.run, model=replace(case.run.model, head_backward="sketch"))
        exact, case = values(case), replace(case, run=run, entries=5.0, flat=0.0)  # noqa: PLW2901
        lists = tokens * 5 * 8 + 8 * (tokens + 1)
        ours = values(case)
        name = "workspace of the head"
        assert ours[name] - exact.pop(name) == (0 if case.placement.cpu else 32 * 18 * 16)
        assert dict(ours.items() - exact.items()) == {
            name: ours[name],
            "entries of the sketch": lists,
            "dX": b * tokens * 8,
        }
        assert exact.keys() - ours.keys() == {"dX, float32", "dW accumulator, float32"}
        flat = values(replace(case, flat=1 / 32))["entries of the sketch"]
        assert flat == lists + tokens / 32 * 32 * b
        # more than a quarter of dW's memory: dX and dW of all tokens, added up at once
        many = values(replace(case, flat=0.25))["entries of the sketch"]
        assert many == lists + 4 * (tokens * 8 + 32 * 8)


def test_at_a_small_vocabulary_no_token_is_sketched(models: dict[str, str]) -> None:
    """64 entries cost 1,280 columns on a CPU, 12,288 on a GPU."""
    for model, cpu, share in (("untied", True, 1), ("7b", True, 0), ("7b", False, 0)):
        case = replace(case_of(models, model), placement=Placement(cpu=cpu))
        assert case.flat_share == share
    case = replace(case_of(models, "7b"), entries=1000.0)
    assert case.flat_share == 0  # of 152,064 columns 20,000
    assert replace(case, placement=Placement()).flat_share == 1  # 192,000
    assert replace(case_of(models, "untied"), flat=0.5).flat_share == 0.5


def test_a_large_head_is_added_up_in_float32_after_its_workspace(models: dict[str, str]) -> None:
    case = case_of(models, "7b")
    model = replace(case.run.model, head_backward="sketch")
    optim = replace(case.run.optim, workspace_bytes=10**8)
    sizes = values(replace(case, run=replace(case.run, model=model, optim=optim)))
    assert sizes["dX and dW, float32"] == 4 * (64 + 152_064) * 3584
    assert "workspace of the head" not in sizes


def test_moments_add_up_what_is_held_together(models: dict[str, str]) -> None:
    held = by_moment(memory_terms(case_of(models, "untied")))
    states, gradients = 12 * 1736, 4 * 1736
    pack = 8192 + 77824 + 2048  # last norm, activations, dX
    assert held == {
        "prefill": states + 1536 + 6912 + 720,
        "decode": states + 4096 + 1024 + 2560,
        "teacher": states + gradients,
        "head": states + gradients + pack + 118784 + 1024,
        "backward": states + gradients + pack + 12288,
        "root": states + gradients + 1024,
        "optimizer": states + gradients + 2048,
    }


def test_gradients_do_not_exist_before_backward_of_the_only_pack(
    models: dict[str, str],
) -> None:
    case = case_of(models, "untied")
    one_pack = replace(case, run=replace(case.run, optim=OptimConfig(micro_batch_tokens=128)))
    assert one_pack.pack_tokens == 128
    moments = {t.name: t.when for t in memory_terms(one_pack)}["gradients, float32"]
    assert moments == ("root", "optimizer")


def test_a_tied_head_and_autocast_on_one_gpu(models: dict[str, str]) -> None:
    case = case_of(models, "tied")
    bf16 = replace(case.run, model=ModelConfig(dtype="bfloat16"))
    sizes = values(replace(case, run=bf16, placement=Placement()))
    assert sizes["weights, float32"] == 4 * 1480
    assert sizes["the tied head's gradient"] == 4 * 256
    assert sizes["weights in bfloat16"] == 2 * 1216
    assert sizes["head in bfloat16"] == 2 * 256
    assert sizes["copy of the policy that samples"] == 2 * 1480
    assert sizes["activations"] == 2 * 64 * (10 * 16 + 2 * (ATTENTION + 4 * 16))
    assert sizes["keys and values"] == 4 * 16 * 2 * (4 + 2) * 4
    assert sizes["AdamW temporaries"] == 4 * 1480
    assert "the tied head's gradient" not in values(case_of(models, "untied"))


def test_prefetched_rollouts_are_held_beside_the_update(models: dict[str, str]) -> None:
    case = case_of(models, "untied")
    prefetching = replace(case, run=replace(case.run, engine=EngineConfig(staleness=1)))
    held, more = by_moment(memory_terms(case)), by_moment(memory_terms(prefetching))
    copy = 4 * 1736
    decode = 4096 + 1024 + 2560  # see test_moments_add_up_what_is_held_together
    assert more["decode"] == held["decode"] + copy
    for moment in ("teacher", "head", "backward", "root", "optimizer"):
        assert more[moment] == held[moment] + copy + decode


def test_only_a_masked_attention_takes_a_mask(models: dict[str, str]) -> None:
    """Four GPUs, bfloat16, layers recomputed, packs of 32 tokens: q = 8 and kv = 4 numbers."""
    case = sharded_case(models)
    for attention, width, mask in (("sdpa", 32, 2048), ("flash_attention_2", 24, None)):
        model = replace(case.run.model, attention=attention)
        sizes = values(replace(case, run=replace(case.run, model=model)))
        assert sizes["one layer, recomputed"] == 32 * (8 * 16 + 2 * (width + 4 * 16)), attention
        assert sizes.get("a layer's mask") == mask
        assert sizes.get("teacher's mask") == (mask and 3 * 32 * 32)
    float32 = replace(case.run, model=replace(case.run.model, dtype="float32"))
    sizes = values(replace(case, run=float32))
    assert sizes["one layer, recomputed"] == 32 * (12 * 16 + 4 * (5 * 8 + 4 * 16))


def test_an_offloaded_policy_is_not_on_the_gpu(models: dict[str, str]) -> None:
    kept = values(sharded_case(models))
    away = values(sharded_case(models, offload_policy=True))
    lasting = {"weights, float32", "gradients, float32", "AdamW moments", "AdamW temporaries"}
    assert kept.keys() - away.keys() == lasting


def test_formulas_say_what_the_numbers_are(models: dict[str, str]) -> None:
    """Multiplies the first word of each factor, which is its number."""
    for term in memory_terms(sharded_case(models)):
        top, *over = term.formula.split(" / ")
        numbers = [float(part.split()[0].replace(",", "")) for part in top.split(" · ")]
        divisor = float(over[0].split()[0]) if over else 1.0
        assert math.prod(numbers) / divisor == pytest.approx(term.value), term


@pytest.mark.parametrize(
    ("family", "sizes", "parameters"),
    [("qwen2", QWEN2_7B, 7_615_616_512), ("llama", LLAMA_8B, 8_030_261_248)],
    ids=["Qwen2.5-7B", "Llama-3.1-8B"],
)
def test_parameters_of_published_models(
    tmp_path: Path, family: str, sizes: dict[str, Any], parameters: int
) -> None:
    shape = read_shape(write_config(tmp_path / "model", family, **sizes), "model.policy")
    assert shape.parameters == parameters
    assert not shape.tied


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma2"])
def test_parameters_are_those_of_the_real_model(tmp_path: Path, family: str, tied: bool) -> None:
    sizes = POLICY | {"tie_word_embeddings": tied}
    shape = read_shape(write_config(tmp_path / "model", family, **sizes), "model.policy")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_config(config)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.layers_parameters) == (2, sum(layers))
    assert shape.root_parameters == 256 * (2 - tied) + 8
    assert shape.active_parameters == sum(layers)
    assert shape.read_parameters(4) == sum(layers) + 256
    assert shape.tied == tied
    for layer in shape.each:
        assert layer.normed == (32 if family == "gemma2" else 16)
        assert layer.heads_normed == (8 + 4 if family == "qwen3" else 0)


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_activations_are_what_autograd_keeps(
    tmp_path: Path, family: str, checkpointing: bool, attention: str
) -> None:
    """Checks a pack of two sequences on a CPU, to 2%: positions and sums over tokens are small."""
    sizes = POLICY | {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 320, "num_hidden_layers": 3}
    config = transformers.AutoConfig.for_model(family, **(SPECIAL | sizes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.train()
    if checkpointing:
        checkpoint_activations(model)
    T = 192
    positions = torch.arange(T // 2).repeat(2)[None]
    more = {}
    if attention == NAME:
        more = packed_arguments([T // 2, T // 2], torch.device("cpu"))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(1, T, dtype=torch.int64)
        model.model(input_ids=ids, position_ids=positions, use_cache=False, **more)
    kept_bytes = sum(t.untyped_storage().nbytes() for t in kept.values())
    config.save_pretrained(tmp_path)
    run = TrainConfig(
        method=MethodConfig(kd=None),
        model=ModelConfig(gradient_checkpointing=checkpointing, attention=attention),
        data=DataConfig(max_prompt_tokens=10),
        sampling=SamplingConfig(max_new_tokens=90),
        optim=OptimConfig(micro_batch_tokens=T),
    )
    shape = read_shape(str(tmp_path), "model.policy")
    case = Case(run=run, policy=shape, teacher=None, placement=Placement(cpu=True))
    terms = values(case)
    names = ["last norm, hidden states", "activations", "masks of the layers"]
    if checkpointing:
        names[1:] = ["inputs of the layers"]
    after = 2 * 4 * T * 128  # the last norm's output and its loss tokens, which only the head keeps
    predicted = sum(terms.get(name, 0) for name in names) - after
    assert predicted == pytest.approx(kept_bytes, rel=0.02)


def test_more_gpus_never_hold_more(models: dict[str, str]) -> None:
    """Compares two GPUs and more: a single one holds no gathered copies."""
    case = sharded_case(models)
    sizes = [
        by_moment(memory_terms(replace(case, placement=Placement(gpus=gpus))))
        for gpus in (2, 3, 4, 8, 64)
    ]
    for fewer, more in itertools.pairwise(sizes):
        assert all(more[moment] <= fewer[moment] for moment in fewer)
    assert sizes[-1]["head"] < sizes[0]["head"]


def test_longer_packs_hold_more(models: dict[str, str]) -> None:
    case = case_of(models, "untied")
    sizes = [
        by_moment(
            memory_terms(
                replace(case, run=replace(case.run, optim=OptimConfig(micro_batch_tokens=tokens)))
            )
        )
        for tokens in (16, 32, 64, 96)
    ]
    for shorter, longer in itertools.pairwise(sizes):
        assert shorter["head"] < longer["head"]
        assert shorter["backward"] < longer["backward"]
        assert shorter["decode"] == longer["decode"]


def test_a_pack_of_one_long_sequence_is_not_shortened_by_its_budget(models: dict[str, str]) -> None:
    case = case_of(models, "untied")
    short = replace(case.run, optim=OptimConfig(micro_batch_tokens=8))
    remedy = {t.name: t.remedy for t in memory_terms(replace(case, run=short))}["dX, float32"]
    assert remedy.startswith("lower sampling.max_new_tokens")
