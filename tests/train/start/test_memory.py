"""The memory check compares the estimate of `plan` with the device."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kdrl_train import cli, train
from kdrl_train.config import EngineConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.start import memory, preflight
from kdrl_train.start.estimate.devices import memory_bytes
from kdrl_train.start.estimate.memory import by_moment, memory_terms
from kdrl_train.start.load import Loaded, load
from kdrl_train.tools.plan.command import PlanConfig, make_estimate

Config = Callable[..., TrainConfig]


def estimate(config: TrainConfig, loaded: Loaded, ranks: int = 1) -> float:
    case = memory._case(config, loaded.policy, [loaded.teachers[0].model], ranks)
    return max(by_moment(memory_terms(case)).values())


@pytest.fixture
def device_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """device_with(bytes) makes the device say that it has so much memory."""
    return lambda size: monkeypatch.setattr(memory, "memory_bytes", lambda *_: size)


def test_this_machine_holds_a_tiny_run(config: Config) -> None:
    settings = config()
    loaded = load(settings)
    detail = memory.check_memory(settings, loaded.policy, [loaded.teachers[0].model], 1)
    gigabytes = estimate(settings, loaded) / 1e9
    assert detail.startswith(f"{gigabytes:,.2f} GB at its worst (")
    assert detail.endswith(f"cpu has {memory_bytes(torch.device('cpu'), 1) / 1e9:,.2f} GB")


def test_a_self_teacher_costs_what_its_copy_costs(config: Config) -> None:
    """Nothing live, its weights frozen, float32 weights averaged; and longer packs."""
    base = config()
    held = {}
    for kind in ("live", "frozen", "ema"):
        model = replace(base.model, teacher="self", self_teacher=kind, dtype="bfloat16")
        data = replace(base.data, teacher_template="{prompt}{answer}")
        settings = replace(base, model=model, data=data)
        loaded = load(settings)
        case = memory._case(settings, loaded.policy, [loaded.teachers[0].model], 1)
        held[kind] = {term.name: term.value for term in memory_terms(case)}
        half = replace(settings, data=replace(data, max_teacher_prompt_tokens=2044))
        layers = [
            next(t.value for t in memory_terms(one) if t.name == "a layer of the teacher")
            for one in (case, replace(case, run=half))
        ]
        assert layers[0] / layers[1] == (4096 + 8) / (2044 + 8)
    parameters = sum(p.numel() for p in loaded.policy.parameters())
    assert [terms.get("teacher") for terms in held.values()] == [
        None,
        2 * parameters,
        4 * parameters,
    ]


def test_a_little_too_much_is_a_warning_and_far_too_much_a_failure(
    config: Config, device_with: Callable[[float], None]
) -> None:
    settings = config()
    loaded = load(settings)
    peak = estimate(settings, loaded)
    device_with(peak)
    memory.check_memory(settings, loaded.policy, [loaded.teachers[0].model], 1)
    device_with(peak / 1.09)
    with pytest.raises(UserWarning, match=r"may not fit: .* for each of 1 process"):
        memory.check_memory(settings, loaded.policy, [loaded.teachers[0].model], 1)
    device_with(peak / 1.11)
    with pytest.raises(
        ValueError, match=r"must fit .* prompts: lower sampling\.batch_size or data\.max_"
    ):
        memory.check_memory(settings, loaded.policy, [loaded.teachers[0].model], 1)
    device_with(1.0)
    assert estimate(settings, loaded, ranks=4) < peak
    with pytest.raises(ValueError, match=r"for each of 4 process.*teacher: raise --gpus"):
        memory.check_memory(settings, loaded.policy, [loaded.teachers[0].model], 4)


def test_what_is_not_modelled_is_not_estimated(config: Config) -> None:
    settings = config()
    loaded = load(settings)
    eager = replace(settings, model=replace(settings.model, attention="eager"))
    detail = memory.check_memory(eager, loaded.policy, [loaded.teachers[0].model], 1)
    assert detail.startswith("not estimated: ")
    vllm = replace(settings, engine=EngineConfig(kind="vllm"))
    detail = memory.check_memory(vllm, loaded.policy, [loaded.teachers[0].model], 1)
    assert detail == "not estimated: engine.kind vllm is not modelled"
    with pytest.raises(ValueError, match=r'kind must be "generate" to be planned, got "vllm'):
        make_estimate(PlanConfig(engine=vllm.engine))


@pytest.mark.parametrize("kind", [TypeError, KeyError])
def test_what_cannot_be_estimated_ends_no_run(
    config: Config,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise kind("intermediate_size is a list")

    settings = config(steps=1)
    loaded = load(settings)
    monkeypatch.setattr(memory, "shape_of", fail)
    message = rf"^not estimated: {kind.__name__}: '?intermediate_size is a list"
    with pytest.raises(UserWarning, match=message):
        memory.check_memory(settings, loaded.policy, [loaded.teachers[0].model], 1)
    if kind is TypeError:
        assert preflight.main(settings) == 0
        assert "not estimated: TypeError" in " ".join(capsys.readouterr().out.split())
        out = io.StringIO()
        train.main(settings, Console(file=out))
        assert "memory: not estimated: TypeError: intermediate_size is a list" in out.getvalue()


def test_a_server_samples_elsewhere_and_a_checkpoint_in_a_thread_is_a_copy(config: Config) -> None:
    settings = config()
    loaded = load(settings)
    server = EngineConfig(kind="vllm_server", url="http://host:1")
    kinds = (settings, replace(settings, engine=server), replace(settings, save_async=True))
    plain, elsewhere, copied = (
        memory_terms(memory._case(kind, loaded.policy, [loaded.teachers[0].model], 1))
        for kind in kinds
    )
    sampling = {term for term in plain if set(term.when) <= {"prefill", "decode"}}
    assert len(sampling) == 6
    assert set(plain) - set(elsewhere) == sampling
    (copy,) = set(copied) - set(plain)
    assert copy.value == 12 * sum(p.numel() for p in loaded.policy.parameters())


def test_check_exits_with_1_and_train_warns(
    config: Config,
    device_with: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = config(steps=1)
    file = settings.out.with_suffix(".yaml")
    save_yaml(settings, file)
    peak = estimate(settings, load(settings))
    device_with(peak / 2)
    assert cli.main(["check", "--config", str(file)]) == 1
    device_with(peak / 1.05)
    assert cli.main(["check", "--config", str(file)]) == 0
    assert "warning" in capsys.readouterr().out
    out = io.StringIO()
    train.main(settings, Console(file=out))
    assert "memory: may not fit: " in out.getvalue()
