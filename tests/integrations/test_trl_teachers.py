"""What a teacher may be: a model, its folder, or a real server; what does not fit is refused."""

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer, teachers
from kdrl_kernels.integrations.trl.teachers import (
    Pupil,
    TeacherServer,
    check_teacher_model,
    local_teacher,
    wrapped,
)
from kdrl_train.model.teacher.client import TeacherError, vocabulary_hash
from kdrl_train.start import teacher_server
from tests.train.servers import Scripted, by_position, free_port, running, teacher_app

pytestmark = pytest.mark.filterwarnings(
    # TRL and peft read names that transformers 5 calls old
    "ignore:.*gradient_checkpointing. is deprecated:FutureWarning"
)
URL = "http://127.0.0.1:1"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., KdrlConfig]:
    def make(**options: Any) -> KdrlConfig:
        options = {"output_dir": str(tmp_path / "run"), "report_to": "none"} | options
        return KdrlConfig(use_cpu=True, bf16=False, **options)

    return make


@pytest.fixture
def pupil(tiny: Callable[..., Any], tokenizer: Any) -> Pupil:
    student = tiny("qwen2", seed=1, tie_word_embeddings=True)
    return Pupil(student, tokenizer, [tokenizer.eos_token_id])


def test_arguments_that_cannot_be_right_are_refused(
    config: Callable[..., KdrlConfig], pupil: Pupil
) -> None:
    options = {"dtype": "float32"}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (None, {}, r"teacher_model must be set with kd='k2', got None"),
        ("folder", {"kd": None}, r"teacher_model must be None with kd=None, got one"),
        (3, {}, r"teacher_model must be a model of transformers, .*, got int"),
        (pupil.model, {}, r"teacher_model must not share weights with model"),
        ("localhost:8765", {}, r"must be http://host:port for a server, got 'localhost:8765'"),
        (URL, {"kd": "rkl"}, r"kd must be one of .* for a teacher behind a URL, got 'rkl'"),
        (URL, {"kd": "topk_rkl"}, r"kd must be one of .* for a teacher behind a URL"),
        (URL, {"kd_baseline": "kl"}, r"kd_baseline None for a teacher behind a URL, got 'k2' and"),
        (URL, {"teacher_model_init_kwargs": options}, r"teacher_model_init_kwargs must be None"),
        ("folder", {"teacher_api": "openai"}, r"teacher_api must be 'kdrl' for a teacher in this"),
    ]
    for teacher, changes, message in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            check_teacher_model(teacher, config(**changes), pupil.model)
        assert "\n" not in str(error.value)
    check_teacher_model(None, config(kd=None), pupil.model)
    check_teacher_model("folder", config(teacher_model_init_kwargs=options), pupil.model)
    for kd in ("k2", "k3", "k3_ratio"):
        check_teacher_model(URL, config(kd=kd), pupil.model)


def test_a_folder_is_loaded_in_the_students_dtype(
    config: Callable[..., KdrlConfig], pupil: Pupil, folders: dict[str, Path], tiny: Any
) -> None:
    teacher = local_teacher(folders["teacher"], config(), pupil)
    expected = tiny("llama", seed=3, hidden=48, tie_word_embeddings=False)
    for (name, weight), original in zip(
        teacher.named_parameters(), expected.parameters(), strict=True
    ):
        assert_close(weight, original, msg=name)
        assert not weight.requires_grad
    pupil.model.bfloat16()
    assert local_teacher(str(folders["teacher"]), config(), pupil).dtype == torch.bfloat16
    for name in ("dtype", "torch_dtype"):
        options = config(teacher_model_init_kwargs={name: "float32"})
        assert local_teacher(str(folders["teacher"]), options, pupil).dtype == torch.float32


def test_an_object_is_frozen_and_has_no_dropout(
    config: Callable[..., KdrlConfig], pupil: Pupil, tiny: Callable[..., Any]
) -> None:
    teacher = tiny("llama", seed=3, attention_dropout=0.5).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(teacher(ids).logits, teacher(ids).logits)
    assert local_teacher(teacher, config(), pupil) is teacher
    assert torch.equal(teacher(ids).logits, teacher(ids).logits)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_without_a_plain_head_is_refused_at_once(
    config: Callable[..., KdrlConfig], pupil: Pupil, tiny: Callable[..., Any]
) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    adapted = get_peft_model(tiny("llama", seed=3, tie_word_embeddings=False), adapter)
    cases = [
        (tiny("llama", seed=3).model, "must be a causal LM of transformers, got LlamaModel"),
        (torch.nn.Linear(3, 3), "must be a causal LM of transformers, got Linear"),
        (adapted, r"must have no adapter on its LM head, got one: pass .*merge_and_unload"),
    ]
    for teacher, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            local_teacher(teacher, config(), pupil)
        assert "\n" not in str(error.value)
    local_teacher(adapted.merge_and_unload(), config(), pupil)


def test_weights_of_the_student_are_refused(
    config: Callable[..., KdrlConfig], pupil: Pupil, tiny: Callable[..., Any]
) -> None:
    teacher = tiny("qwen2", seed=3, tie_word_embeddings=True)
    teacher.model.layers[0] = pupil.model.model.layers[0]
    with pytest.raises(ValueError, match=r"teacher_model must not share weights with model"):
        local_teacher(teacher, config(), pupil)
    local_teacher(copy.deepcopy(pupil.model), config(), pupil)


def test_another_tokenizer_is_refused(
    config: Callable[..., KdrlConfig], pupil: Pupil, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["teacher"], tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"A":', '"AA":').replace('"B":', '"A":'))
    message = r"teacher_model must have the student's tokenizer, got another: token 34 is 'A' for"
    with pytest.raises(ValueError, match=message) as error:
        local_teacher(str(tmp_path / "other"), config(), pupil)
    assert "\n" not in str(error.value)
    for tokens in (tmp_path / "other").glob("*token*"):
        tokens.unlink()
    with pytest.raises(ValueError, match=r"teacher_model must have a tokenizer beside its weights"):
        local_teacher(str(tmp_path / "other"), config(), pupil)


def test_a_named_object_is_compared_by_its_tokenizer(
    config: Callable[..., KdrlConfig],
    pupil: Pupil,
    folders: dict[str, Path],
    tiny: Callable[..., Any],
    tmp_path: Path,
) -> None:
    teacher = tiny("llama", seed=3)
    teacher.name_or_path = str(folders["teacher"])
    local_teacher(teacher, config(), pupil)
    shutil.copytree(folders["teacher"], tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"A":', '"AA":'))
    teacher.name_or_path = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"must have the student's tokenizer, got another"):
        local_teacher(teacher, config(), pupil)
    teacher.name_or_path = str(tmp_path / "nowhere")
    local_teacher(teacher, config(), pupil)  # nothing to compare with


def test_a_head_with_too_few_columns_is_refused(
    config: Callable[..., KdrlConfig], pupil: Pupil, tiny: Callable[..., Any]
) -> None:
    message = r"must have a column for every token, got 250 columns and a token with id 257"
    with pytest.raises(ValueError, match=message):
        local_teacher(tiny("llama", vocab_size=250), config(), pupil)
    local_teacher(tiny("llama", vocab_size=300), config(), pupil)


def test_tokens_that_the_student_cannot_sample_need_no_column(
    config: Callable[..., KdrlConfig], pupil: Pupil, tiny: Callable[..., Any]
) -> None:
    narrow = replace(pupil, model=tiny("llama", vocab_size=250))
    local_teacher(tiny("llama", vocab_size=250, seed=3), config(), narrow)
    with pytest.raises(ValueError, match=r"got 249 columns and a token with id 249"):
        local_teacher(tiny("llama", vocab_size=249), config(), narrow)


def test_other_ends_of_sequence_are_refused_unless_masked(
    config: Callable[..., KdrlConfig], pupil: Pupil, tiny: Callable[..., Any]
) -> None:
    teacher = tiny("llama", eos_token_id=[0, 40])
    message = r"must end sequences as the student does, got \[40\] \(\['G'\]\) beside .* \[0\]"
    with pytest.raises(ValueError, match=message):
        local_teacher(teacher, config(), pupil)
    local_teacher(teacher, config(kd_eos="mask"), pupil)
    local_teacher(teacher, config(), replace(pupil, eos_ids=[40, 0]))


def test_a_reference_model_is_not_wrapped_again(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    assert wrapped(model, SimpleNamespace(ref_model=model)) is model


def batch() -> dict[str, Tensor]:
    """Three completions, padded as TRL pads them; the last one is empty."""
    return {
        "prompt_ids": torch.tensor([[1, 1, 50, 51], [40, 41, 42, 43], [1, 60, 61, 62]]),
        "prompt_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
        "completion_ids": torch.tensor([[70, 71, 72], [80, 0, 1], [90, 91, 92]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
    }


def by_full_logits(model: Any, inputs: dict[str, Tensor], temperature: float) -> Tensor:
    """The model's log-probabilities of the completions' tokens, one sequence at a time."""
    expected = torch.zeros(inputs["completion_ids"].shape, dtype=torch.float64)
    for r, mask in enumerate(inputs["completion_mask"].bool()):
        prompt = inputs["prompt_ids"][r][inputs["prompt_mask"][r].bool()]
        completion = inputs["completion_ids"][r][mask]
        if len(completion):
            logits = model.double()(torch.cat([prompt, completion])[None]).logits[0]
            scores = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(dim=1)
            expected[r, mask] = scores.gather(1, completion[:, None])[:, 0].detach()
    return expected


@pytest.fixture
def scripted(tokenizer: Any) -> Iterator[tuple[Scripted, str]]:
    server = Scripted(by_position, tokenizer=vocabulary_hash(tokenizer))
    with running(server.app()) as url:
        yield server, url


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_real_server_gives_the_teachers_logprobs(
    config: Callable[..., KdrlConfig],
    pupil: Pupil,
    folders: dict[str, Path],
    tiny: Any,
    temperature: float,
) -> None:
    inputs = batch()
    with running(teacher_app(folders["teacher"])) as url:
        server = TeacherServer(url, config(temperature=temperature), pupil)
        logprobs = server.logprobs(inputs)
        server.close()
    teacher = tiny("llama", seed=3, hidden=48, tie_word_embeddings=False)
    expected = by_full_logits(teacher, inputs, temperature)
    assert logprobs.dtype == torch.float32
    assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    assert logprobs[inputs["completion_mask"] == 0].eq(0).all()


def test_only_distilled_completions_are_sent(
    config: Callable[..., KdrlConfig], pupil: Pupil, scripted: tuple[Scripted, str]
) -> None:
    script, url = scripted
    server = TeacherServer(url, config(), pupil)
    inputs = batch() | {"kd_weight": torch.tensor([0.0, 0.5, 1.0])}
    logprobs = server.logprobs(inputs)
    server.close()
    assert list(script.queries) == [(40, 41, 42, 43, 80, 0)]
    expected = torch.tensor([[0, 0, 0], [-4.08, -5.0, 0], [0, 0, 0]])
    assert_close(logprobs, expected)


def test_columns_that_the_student_lacks_are_left_out(
    config: Callable[..., KdrlConfig], pupil: Pupil, tokenizer: Any
) -> None:
    sizes = []
    for columns in (258, 300):
        script = Scripted(by_position, tokenizer=vocabulary_hash(tokenizer), vocab_size=columns)
        with running(script.app()) as url:
            server = TeacherServer(url, config(temperature=0.5), pupil)
            server.logprobs(batch())
            server.close()
        sizes.append({body["vocab_size"] for body in script.bodies})
        assert {body["temperature"] for body in script.bodies} == {0.5}
    assert sizes == [{None}, {258}]


def test_another_model_during_the_run_stops_it(
    config: Callable[..., KdrlConfig], pupil: Pupil, scripted: tuple[Scripted, str], tmp_path: Path
) -> None:
    script, url = scripted
    server = TeacherServer(url, config(), pupil)
    server.logprobs(batch())
    server.save(tmp_path)
    server.check_same(tmp_path)
    script.info |= {"fingerprint": "two", "dtype": "bfloat16"}
    with pytest.raises(TeacherError, match=r"must stay the same during a run"):
        server.logprobs(batch())
    server.close()
    other = TeacherServer(url, config(), pupil)
    with pytest.raises(TeacherError, match=r"got another one .*start a new .* another output_dir"):
        other.check_same(tmp_path)
    other.close()


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            {"tokenizer": "?"},
            r"must have the policy's tokenizer, got another map.*family; teacher_model set to",
        ),
        ({"vocab_size": 250}, r"teacher_model must have a column for every token, got 250"),
        ({"eos_ids": [0, 40]}, r"must end sequences as the student does, got \[40\]"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    config: Callable[..., KdrlConfig],
    pupil: Pupil,
    scripted: tuple[Scripted, str],
    info: dict[str, Any],
    message: str,
) -> None:
    script, url = scripted
    script.info |= info
    with pytest.raises(ValueError, match=message) as error:
        TeacherServer(url, config(), pupil)
    assert "\n" not in str(error.value)


def test_no_server_is_refused_in_trls_words(
    config: Callable[..., KdrlConfig], pupil: Pupil
) -> None:
    message = r"^teacher_model must reply, got .*: start it with `python -m kdrl_train serve`"
    with pytest.raises(TeacherError, match=message):
        TeacherServer(f"http://127.0.0.1:{free_port()}", config(), pupil)
    with pytest.raises(ValueError, match=r"teacher_model must be http://host:port without a user"):
        TeacherServer("http://user:word@127.0.0.1:1", config(), pupil)


def test_an_openai_server_needs_temperature_1(
    config: Callable[..., KdrlConfig], pupil: Pupil, scripted: tuple[Scripted, str]
) -> None:
    script, url = scripted
    script.text = lambda token: pupil.tokenizer.decode([token])
    with pytest.raises(ValueError, match=r"^temperature must be 1 with teacher_api \"openai\""):
        TeacherServer(url, config(teacher_api="openai", temperature=0.5), pupil)
    server = TeacherServer(url, config(teacher_api="openai"), pupil)
    logprobs = server.logprobs(batch())
    server.close()
    assert_close(logprobs[1], torch.tensor([-4.08, -5.0, 0.0]))


def test_a_server_cannot_teach_a_model_that_sees_images(pupil: Pupil) -> None:
    trainer: Any = SimpleNamespace(
        model=pupil.model, _tokenizer=pupil.tokenizer, eos_token_ids=[0], _is_vlm=True
    )
    with pytest.raises(ValueError, match=r"teacher_model must be in this process for a model that"):
        KdrlTrainer._take_teacher(trainer, URL)


def test_a_server_that_others_can_read_is_warned_of(
    config: Callable[..., KdrlConfig],
    pupil: Pupil,
    scripted: tuple[Scripted, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(teacher_server, "is_exposed", lambda _url: True)
    monkeypatch.setattr(
        teachers.logger, "warning", lambda form, *values: said.append(form % values)
    )
    TeacherServer(scripted[1], config(), pupil).close()
    assert len(said) == 1
    assert said[0].startswith("teacher_model should be https, or in a private network, got http://")
