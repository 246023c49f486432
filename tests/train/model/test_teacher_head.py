"""The head of a teacher behind a URL: read alone from its files, and that of the served model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kdrl_kernels as kk
from kdrl_train.model.packing import feed
from kdrl_train.model.policy import HeadedModel
from kdrl_train.model.teacher.client import TeacherError, TeacherInfo
from kdrl_train.model.teacher.head import ServedHead, load_head, logit_numbers
from kdrl_train.model.teacher.identity import FILE, check_same_teacher, keep_teacher
from kdrl_train.model.teachers import Teachers
from tests.train.coefficients import coefficients_of
from tests.train.model.test_policy import (
    METHODS,
    pair,
    relative_error,
    some_rollouts,
    step_gradient,
)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "softcap": ("gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "scale": ("granite", {"logits_scaling": 4.0}),
    "bias": ("phi", {"partial_rotary_factor": 0.5}),
    "another name": ("gpt_neox", {"tie_word_embeddings": False}),
}


def info_of(model: Any) -> TeacherInfo:
    """Say what a server would of a model's head."""
    weight = model.get_output_embeddings().weight
    scale, softcap = logit_numbers(model.config)
    columns, width = weight.shape
    return TeacherInfo("m", 256, columns, hidden_size=width, logit_scale=scale, softcap=softcap)


def read(folder: Path, info: TeacherInfo, temperature: float = 0.7) -> ServedHead:
    device = torch.device("cpu")
    more = {"temperature": temperature, "dtype": torch.float32, "device": device}
    return load_head("teacher.head", str(folder), info, **more)


def assert_same_logits(head: ServedHead, model: Any) -> None:
    ids = torch.randint(258, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = HeadedModel(model).hidden(ids, torch.arange(9)[None], None, [9])
        exact = (model(input_ids=ids).logits[0] / 0.7).log_softmax(dim=1)
    teacher = head.of(states, 9)
    out = kk.linear_logprobs(
        teacher.hidden,
        teacher.weight,
        ids[0],
        bias=teacher.bias,
        temperature=teacher.temperature,
        softcap=teacher.softcap,
    )
    torch.testing.assert_close(
        out.logprobs, exact.gather(1, ids.T).squeeze(1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_head_and_states_are_the_model(tiny: Callable[..., Any], tmp_path: Path, name: str) -> None:
    family, config = FAMILIES[name]
    model = tiny(family, **config)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(tmp_path)
    head = read(tmp_path, info_of(model))
    assert (head.bias is None) == (bias is None)
    assert_same_logits(head, model)
    zeros = head.of(None, 3).hidden
    assert (zeros.shape, zeros.abs().max().item()) == ((3, head.weight.shape[1]), 0.0)


def test_one_file_of_many_is_read(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = [path for path in tmp_path.glob("model-*") if "lm_head.weight" not in load_file(path)]
    assert len(shards) > 2
    for path in shards:
        path.unlink()
    assert_same_logits(read(tmp_path, info_of(model)), model)


def test_a_file_of_torch_save_is_read(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("qwen2", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_logits(read(tmp_path, info_of(model)), model)


def test_the_head_of_another_model_is_refused(folders: dict[str, Path], tiny: Any) -> None:
    info = info_of(tiny("llama", hidden=48, tie_word_embeddings=False))
    assert len(read(folders["teacher"], info).weight) == 258
    changes = {
        "258 columns, and 300 there": {"vocab_size": 300},
        "48 numbers in a state, and 64 there": {"hidden_size": 64},
        "1.0 as logit_scale, and 0.5 there": {"logit_scale": 0.5},
        "None as softcap, and 30.0 there": {"softcap": 30.0},
    }
    for message, change in changes.items():
        with pytest.raises(
            ValueError, match=rf"teacher\.head = .* must be the head of m, .*{message}"
        ):
            read(folders["teacher"], replace(info, **change))


def test_a_head_that_cannot_be_read_is_named(
    folders: dict[str, Path], tiny: Any, tmp_path: Path
) -> None:
    info = info_of(tiny("llama", hidden=48, tie_word_embeddings=False))
    copy = shutil.copytree(folders["teacher"], tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    weight = tensors.pop("lm_head.weight")
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"teacher\.head must be .*its files have none of lm_head"):
        read(copy, info)
    save_file(tensors | {"lm_head.weight": weight[:9].clone()}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[9, 48\] .* \[258, 48\] by"):
        read(copy, info)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"teacher\.head must be .*it has no weights"):
        read(copy, info)
    with pytest.raises(ValueError, match=r"teacher\.head must be .*there is no such folder"):
        read(tmp_path / "nothing", info)
    settings = {"base_model_name_or_path": str(folders["teacher"])}
    (copy / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError, match=r"teacher\.head must be .*it is an adapter, .* merged"):
        read(copy, info)


SLOW = ("jsd", "mixture", "centred k2")


@pytest.mark.parametrize(
    "name",
    ["rkl sequence", "distillation", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)],
)
def test_states_train_as_the_teacher_does(tiny: Callable[..., Any], name: str) -> None:
    """In float64, some completions unasked for; another teacher's states give another gradient."""
    method = METHODS[name]
    policy, teacher = pair(tiny, method, torch.float64, "qwen2")
    rollouts, rewards = some_rollouts()
    kd_weight = coefficients_of(rewards, method).kd_weight

    def trained(model: Any) -> list[Any]:
        read, states = HeadedModel(model, compute_dtype=torch.float64), []
        for prompt, completion, weight in zip(
            rollouts.prompt_ids, rollouts.completion_ids, kd_weight, strict=True
        ):
            ids, positions, places = feed([prompt], [completion])
            with torch.no_grad():
                known = read.hidden(ids, positions, places, [ids.shape[1]])
            states.append(known if weight > 0 else None)
        weight, bias = read.head()
        head = ServedHead("teacher.head", "m", weight, bias, 0.8, None)
        teachers = Teachers(("default",), remote={0: SimpleNamespace(head=head)})
        return [
            step_gradient(policy, teachers.head, method, budget, teacher_states=states)
            for budget in (1, 12, 1000)
        ]

    local = step_gradient(policy, teacher, method, budget=12)
    for remote in trained(teacher.model):
        assert relative_error(remote[1], local[1]) <= 1e-9
        for key, value in local[2].items():
            assert remote[2][key] == (value and pytest.approx(value, rel=1e-8)), key
    other = trained(tiny("llama", seed=5, hidden=48).double())[0]
    assert relative_error(other[1], local[1]) > 0.01


def test_a_file_of_an_older_version_says_less_of_a_teacher(tmp_path: Path, tiny: Any) -> None:
    info = info_of(tiny("llama", hidden=48, tie_word_embeddings=False))
    keep_teacher(tmp_path, info)
    changed = replace(info, hidden_size=64)
    with pytest.raises(TeacherError, match="hidden_size: 48 in the file, 64 now"):
        check_same_teacher(tmp_path, changed)
    written = json.loads((tmp_path / FILE).read_text())
    del written["hidden_size"]
    (tmp_path / FILE).write_text(json.dumps(written))
    check_same_teacher(tmp_path, changed)
