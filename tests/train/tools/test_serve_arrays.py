"""serve: hidden states, likeliest tokens and others' log-probabilities, bounded as scores are."""

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from fastapi import HTTPException
from safetensors.torch import load
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdrl_train.model.policy import HeadedModel
from kdrl_train.tools.serve import command, replies, requests
from kdrl_train.tools.serve.app import make
from kdrl_train.tools.serve.replies import ArraysResponse, Replies
from kdrl_train.tools.serve.scorer import Job, compute
from tests.train.servers import service
from tests.train.tools.test_serve_requests import send

GOOD = {"ids": [5, 6, 7, 8], "prompt_tokens": 2}
SEQUENCES = [GOOD, {"ids": [9, 10, 11], "prompt_tokens": 1}]
T, K = 2, 3


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> command.ServedTeacher:
    return service(folders["teacher"], queue_size=64)


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders["teacher"]).eval()


def post(served: command.ServedTeacher, path: str, body: Any, **options: Any) -> Any:
    return send(make(served, **options), "POST", path, json=body)


@torch.no_grad()
def exact_states(model: Any, ids: list[int], prompt_tokens: int) -> Tensor:
    """Run the backbone alone, whose last states have gone through its norm."""
    states = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return states[prompt_tokens - 1 : -1]


def test_states_are_what_the_head_reads(loaded: command.ServedTeacher, model: Any) -> None:
    reply = post(loaded, "/hidden", {"sequences": SEQUENCES})
    assert reply.headers["content-type"] == "application/octet-stream"
    arrays = load(reply.content)
    assert sorted(arrays) == ["0.states", "1.states"]
    scores = post(loaded, "/score", {"sequences": SEQUENCES}).json()["logprobs"]
    for i, sequence in enumerate(SEQUENCES):
        states, n = arrays[f"{i}.states"], sequence["prompt_tokens"]
        torch.testing.assert_close(states, exact_states(model, sequence["ids"], n))
        logprobs = (states @ model.lm_head.weight.T).log_softmax(dim=1)
        tokens = torch.tensor(sequence["ids"][n:])[:, None]
        expected = torch.tensor(scores[i])
        torch.testing.assert_close(logprobs.gather(1, tokens).squeeze(1), expected)
    assert f'"fingerprint":"{loaded.info["fingerprint"]}"'.encode() in reply.content[:400]


def test_states_of_a_bfloat16_model_are_sent_as_they_are(model: Any) -> None:
    half = HeadedModel(model, compute_dtype=torch.bfloat16)
    (result,) = compute(half, [Job(torch.tensor([5, 6]), torch.tensor([7]), 1.0, 258, states=True)])
    assert result["states"].dtype == torch.bfloat16
    sent = load(requests.reply([result], "f"))["0.states"]
    torch.testing.assert_close(sent, result["states"], rtol=0, atol=0)


@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, None), (0.7, 200)])
def test_likeliest_and_other_tokens_are_the_models(
    loaded: command.ServedTeacher, model: Any, temperature: float, vocab_size: int | None
) -> None:
    others = [3, 4, 5, 6]  # two for each of two tokens
    sequences = [sequence | {"extra_tokens": others} for sequence in SEQUENCES]
    body = {"sequences": sequences, "topk": K, "temperature": temperature, "vocab_size": vocab_size}
    reply = post(loaded, "/score", body)
    assert reply.status_code == 200, reply.text
    arrays = load(reply.content)
    for i, sequence in enumerate(SEQUENCES):
        ids, n = sequence["ids"], sequence["prompt_tokens"]
        logits = exact_states(model, ids, n) @ model.lm_head.weight.T
        exact = (logits[:, :vocab_size] / temperature).log_softmax(dim=1)
        best = exact.topk(K, dim=1)
        order = arrays[f"{i}.topk_logprobs"].argsort(dim=1, descending=True)
        assert arrays[f"{i}.topk_ids"].gather(1, order).tolist() == best.indices.tolist()
        torch.testing.assert_close(arrays[f"{i}.topk_logprobs"].gather(1, order), best.values)
        at_others = exact.gather(1, torch.tensor(others).view(T, 2))
        torch.testing.assert_close(arrays[f"{i}.extra_logprobs"], at_others)
        tokens = torch.tensor(ids[n:])[:, None]
        torch.testing.assert_close(arrays[f"{i}.logprobs"], exact.gather(1, tokens).squeeze(1))


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize(
    ("path", "body", "code", "message"),
    [
        ("/score", {"topk": 0}, 422, "topk must be in [1, 258], got 0"),
        ("/score", {"topk": 259}, 422, "topk must be in [1, 258], got 259"),
        ("/score", {"topk": 8, "vocab_size": 9}, 413, "at most 100 bytes, got 136"),
        ("/score", {"topk": 3, "vocab_size": 8}, 422, "sequences.0.ids.3 must be in [0, 8), got 8"),
        ("/score", {"topk": 10, "vocab_size": 9}, 422, "topk must be in [1, 9], got 10"),
        ("/hidden", {"topk": 2}, 422, "topk and extra_tokens must be left out for hidden states"),
        ("/hidden", {}, 413, "a reply must have at most 100 bytes, got 384: send fewer tokens, or"),
        ("/hidden", {"sequences": [GOOD, {"ids": [1]}]}, 422, "sequences.1.prompt_tokens: Field"),
        (
            "/hidden",
            {"sequences": [GOOD | {"extra_tokens": [1, 2]}]},
            422,
            "topk and extra_tokens must be left out for hidden states",
        ),
        (
            "/score",
            {"sequences": [GOOD | {"extra_tokens": [1, 258]}]},
            422,
            "sequences.0.extra_tokens.1 must be in [0, 258), got 258",
        ),
        (
            "/score",
            {"sequences": [GOOD | {"extra_tokens": [1, 2, 3]}]},
            422,
            "extra_tokens must hold 1 to 512 ids for each of the 2 tokens of the completion, got 3",
        ),
        (
            "/score",
            {"sequences": [GOOD | {"extra_tokens": [1, 2]}, GOOD]},
            422,
            "sequences.1.extra_tokens must hold as many ids for each token as those of sequences.0",
        ),
    ],
)
def test_a_wrong_request_for_arrays_is_named(
    loaded: command.ServedTeacher, path: str, body: Any, code: int, message: str
) -> None:
    reply = post(loaded, path, {"sequences": [GOOD]} | body, reply_bytes=100)
    assert (reply.status_code, message in reply.text) == (code, True), reply.text


@pytest.mark.fault("attack on serve")
def test_too_many_replies_are_refused() -> None:
    """Eight replies of the largest size may be in memory; then they are refused until one goes."""
    held, room = [ExitStack() for _ in range(replies.REPLIES)], Replies(400)
    for stack in held:
        stack.enter_context(room.of(400))
    with pytest.raises(HTTPException) as refused, room.of(1):
        pass
    assert (refused.value.status_code, refused.value.headers) == (503, {"Retry-After": "1"})
    held[0].close()
    with room.of(400):
        assert room.total == 3200


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize("stuck", [False, True])
def test_a_reply_keeps_its_place_until_it_is_sent(
    stuck: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that reads nothing loses it after READ_S and the time that its bytes may take."""
    monkeypatch.setattr(replies, "READ_S", 0.05)
    monkeypatch.setattr(replies, "PIECE_BYTES", 4)
    room, held, sent = Replies(10), ExitStack(), []

    async def receive() -> Any:
        raise AssertionError

    async def write(message: Any) -> None:
        assert room.total == 10
        sent.append(message.get("body"))
        if stuck and len(sent) == 2:
            await asyncio.sleep(60)

    held.enter_context(room.of(10))
    asyncio.run(ArraysResponse(b"0123456789", held)({}, receive, write))
    assert sent == ([None, b"0123"] if stuck else [None, b"0123", b"4567", b"89"])
    assert room.total == 0


def test_states_that_overflow_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"sequences\.1 must have finite states, got others"):
        requests.reply([{"states": torch.ones(2, 2)}, {"states": torch.tensor([[torch.inf]])}], "f")


def test_a_request_of_all_fields_has_as_many_tokens_as_one_without() -> None:
    """The ids are counted before they are read: 6 of sequences and 2 others."""
    text = '{"sequences":[{"ids":[1,2,3],"prompt_tokens":2,"extra_tokens":[4]},{"ids":[1,2,3],'
    text += '"prompt_tokens":2,"extra_tokens":[5]}],"topk":2,"temperature":1.0,"vocab_size":99}'
    assert len(requests.read(text.encode(), 8, 2).sequences) == 2
    with pytest.raises(requests.TooLargeError, match="at most 7 tokens, got 8"):
        requests.read(text.encode(), 7, 2)
    with pytest.raises(ValueError, match="sequences must hold 1 to 1 sequences, got 2"):
        requests.read(text.encode(), 8, 1)
