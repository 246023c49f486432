"""vLLM itself, on the CPU, as a teacher that gives hidden states: `bash tests/vllm.sh`."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdrl_train.config import ModelConfig, SamplingConfig, TeacherConfig, TrainConfig
from kdrl_train.model.teacher.client import Query, TeacherError
from kdrl_train.model.teacher.openai import PoolingClient, connect
from tests.train.conftest import EXACT
from tests.train.rollouts.test_vllm import LONG, serving
from tests.train.servers import free_port
from tests.train.test_train import run

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's own warnings

POOLING = {
    "runner": "pooling",
    "convert": "embed",
    "pooler-config": '{"task": "token_embed"}',
    "max-num-batched-tokens": 64,  # LONG is read in parts
}
QUERIES = [
    Query("long", LONG, [50, 0, 7]),
    Query("again", LONG, [50, 0, 7]),  # which may not come from a cache without states
    Query("short", [5], list(range(30, 90))),
]


@pytest.fixture(scope="module")
def teacher(tiny: Callable[..., Any], tokenizer: Any, tmp_path_factory: Any) -> Path:
    """Folder of an untied Llama that vLLM's attention takes, whose final norm is not all ones."""
    folder: Path = tmp_path_factory.mktemp("teacher")
    model = tiny("llama", seed=5, hidden=64, tie_word_embeddings=False)
    torch.nn.init.uniform_(model.model.norm.weight, 0.2, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def states(url: str, dtype: Any, query: Query) -> torch.Tensor:
    """Return the states of a completion from a server."""
    model = ModelConfig(teacher=url, teacher_api="openai", dtype=dtype)
    client = connect(model, TeacherConfig(), states=True)
    assert isinstance(client, PoolingClient)
    with contextlib.closing(client):
        return client.states(query)


def of_transformers(model: Any, query: Query) -> torch.Tensor:
    ids = torch.tensor([query.prompt_ids + query.completion_ids])
    with torch.no_grad():
        whole = model.get_decoder()(input_ids=ids).last_hidden_state[0]
    return whole[len(query.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_transformers(teacher: Path, tmp_path: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=getattr(torch, dtype)).eval()
    promoted = copy.deepcopy(model).double()
    with serving(teacher, free_port(), tmp_path / "log", POOLING | {"dtype": dtype}) as url:
        for query in QUERIES:
            ours, exact = states(url, dtype, query), of_transformers(promoted, query)
            eager = of_transformers(model, query)
            errors = [
                ((one.double() - exact).norm() / exact.norm()).item() for one in (ours, eager)
            ]
            print("\nrelative errors of vLLM and of transformers", errors)
            assert errors[0] <= 2 * errors[1] + torch.finfo(ours.dtype).eps


def test_a_run_is_that_of_the_teacher_in_process(
    config: Callable[..., TrainConfig], teacher: Path, tmp_path: Path
) -> None:
    sampling = SamplingConfig(prompts_per_step=4, group_size=4, max_new_tokens=8, temperature=0.8)
    local = config(out="local", method=EXACT, sampling=sampling, steps=2)
    local = replace(local, model=replace(local.model, teacher=str(teacher)))
    with serving(teacher, free_port(), tmp_path / "log", POOLING) as url:
        model = replace(local.model, teacher=url, teacher_api="openai")
        head = TeacherConfig(head=str(teacher))
        rows = run(replace(local, out=tmp_path / "remote", model=model, teacher=head))
    for row, other in zip(rows, run(local), strict=True):
        for key in ("loss", "kl_teacher", "grad_norm"):
            print("\n", key, row[key], other[key])
            assert row[key] == pytest.approx(other[key], rel=1e-4), key


def test_a_server_of_another_task_is_refused(teacher: Path, tmp_path: Path) -> None:
    """Its embeddings are one for a whole prompt."""
    options = POOLING | {"pooler-config": '{"task": "embed"}'}
    with (
        serving(teacher, free_port(), tmp_path / "log", options) as url,
        pytest.raises(TeacherError, match=r"must give hidden states .* status 400: .*token_emb"),
    ):
        states(url, "float32", QUERIES[0])
