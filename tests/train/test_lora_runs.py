"""Runs with adapters: they resume, sample, export, and start others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from kdrl_train.config import EngineConfig, LogConfig, LoraConfig, OptimConfig, TrainConfig
from kdrl_train.runfolder.checkpoint import read
from kdrl_train.runfolder.untrusted import Reader
from kdrl_train.start import load
from kdrl_train.tools import evaluate
from tests.train.conftest import EXACT
from tests.train.test_train import run, without_times
from tests.train.test_two_ranks import alone, assert_same_metrics, together

# peft 0.21 reads an attribute that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
Config = Callable[..., TrainConfig]
ADAPTERS = LoraConfig(rank=4, alpha=8.0, targets=("all-linear", "lm_head"))
OPTIM = OptimConfig(learning_rate=3e-3, micro_batch_tokens=64)


def of(config: Config, out: str, lora: LoraConfig = ADAPTERS, **fields: Any) -> TrainConfig:
    """A run of the llama with adapters, on its head too."""
    base = config(out, policy="llama", **{"optim": OPTIM} | fields)
    return replace(base, model=replace(base.model, lora=lora))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(2, 20)[None]).logits
    return result


def test_a_run_resumes_to_the_bit_and_leaves_both_folders(
    config: Config, folders: dict[str, Path]
) -> None:
    whole, parts = of(config, "whole", steps=2), of(config, "parts", steps=2)
    expected = run(whole)
    assert all(row["sampler_mismatch_mean"] < 1e-5 for row in expected)
    run(replace(parts, steps=1, save_every=1))
    rows = run(replace(parts, resume=True))
    assert without_times(rows) == without_times(expected)
    ours, theirs = (
        load_file(c.out / "adapter" / "adapter_model.safetensors") for c in (whole, parts)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(tensor.abs().max() > 0 for tensor in ours.values())  # B has moved from 0

    base_file = parts.out / "base.json"
    text = base_file.read_text("utf-8")
    base_file.write_text(text.replace(json.loads(text)["weights"], "0" * 64), "utf-8")
    with pytest.raises(ValueError, match=r"weights that the adapters of .*parts were trained on"):
        run(replace(parts, resume=True, steps=3))

    stored = read(whole.out / "checkpoints" / "step_000002")
    reader = Reader(stored.folder, set(stored.files))
    reader.open()
    names = [name for name in reader.metadata.state_dict_metadata if name.startswith("model.")]
    assert len(names) == len(ours)
    assert all(".lora_" in name for name in names)  # nothing of the base

    merged = AutoModelForCausalLM.from_pretrained(whole.out / "model")
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    before = logits(base)
    beside = peft.PeftModel.from_pretrained(base, str(whole.out / "adapter"))
    assert (logits(merged) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(beside), logits(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_base_teaches_without_a_copy(
    config: Config, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy without its adapters is the teacher that its folder would be."""
    expected = alone(replace_teacher(of(config, "copy", steps=2), str(folders["llama"])))
    itself = replace_teacher(of(config, "self", steps=2), "self")
    monkeypatch.setattr(load, "load_teacher", None)  # no second model is loaded
    assert without_times(run(itself)) == without_times(expected)
    assert expected[1]["kl_teacher"] > 1e-4  # after a step they differ


@pytest.mark.slow
def test_the_base_is_a_reference_without_a_copy(
    config: Config, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(EXACT, extrapolation=1.5)
    loaded: list[str] = []
    load_teacher = load.load_teacher

    def watched(run: TrainConfig, world: Any, name: str) -> Any:
        loaded.append(name)
        return load_teacher(run, world, name)

    monkeypatch.setattr(load, "load_teacher", watched)
    rows = []
    for name, place in (("copy", str(folders["llama"])), ("self", "self")):
        one = of(config, name, steps=2, method=method)
        rows.append(run(replace(one, model=replace(one.model, reference=place))))
    assert without_times(rows[1]) == without_times(rows[0])
    assert loaded == ["default", "reference", "default"]


def replace_teacher(run: TrainConfig, teacher: str) -> TrainConfig:
    return replace(run, model=replace(run.model, teacher=teacher))


@pytest.mark.slow
def test_ranks_train_the_adapters_of_one_process(config: Config) -> None:
    """And their base teaches, on each rank without a copy."""
    settings = (of(config, name, steps=2) for name in ("whole", "parts"))
    whole, parts = (replace_teacher(one, "self") for one in settings)
    assert_same_metrics(together(parts, 2), alone(whole))
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(parts.out / name), load_file(whole.out / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"optim": replace(OPTIM, updates_per_rollout=2)},
        {"engine": EngineConfig(staleness=1)},
        {"log": LogConfig(diagnostics_every=1)},
    ],
    ids=["updates", "stale", "measured"],
)
def test_other_settings_sample_from_the_adapters(config: Config, fields: dict[str, Any]) -> None:
    """An engine with a copy of the model samples from the merged weights."""
    rows = run(of(config, "run", **fields))
    mismatches = [row["sampler_mismatch_mean"] for row in rows]
    assert all(mismatch < 1e-5 for mismatch in mismatches if mismatch is not None), mismatches
    assert any(mismatch is not None for mismatch in mismatches[1:])


@pytest.mark.slow
def test_what_a_run_leaves_is_measured_and_starts_others(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = of(config, "first", steps=2)
    run(first)
    texts: list[list[str]] = []
    summarize = evaluate.summarize

    def kept(rollouts: Any, *rest: Any) -> Any:
        texts.append(rollouts.texts)
        return summarize(rollouts, *rest)

    monkeypatch.setattr(evaluate, "summarize", kept)
    for name in ("model", "checkpoints", "adapter"):  # of_run takes the first one that is there
        settings = evaluate.of_run(first, first.out)
        place = settings.model.weights or Path(settings.model.policy)
        assert place.relative_to(first.out).parts[0] == name
        evaluate.evaluate_sets(replace(settings, max_problems=4))
        (first.out / name).rename(first.out / f"moved_{name}")
    base = replace(settings, model=replace(first.model, lora=LoraConfig()), max_problems=4)
    evaluate.evaluate_sets(base)
    assert texts[0] == texts[1] == texts[2] != texts[3]
    for name in ("adapter", "checkpoints"):
        (first.out / f"moved_{name}").rename(first.out / name)

    newest = first.out / "checkpoints" / "step_000002"
    second = of(config, "second", steps=1)
    second = replace(second, model=replace(second.model, weights=newest))
    whole = replace(first, out=second.out.with_name("whole"), steps=1)
    whole = replace(whole, model=replace(whole.model, policy=str(first.out / "adapter")))
    expected = alone(whole)
    assert without_times(run(second)) == without_times(expected)
    texts.clear()
    for name in ("model", "checkpoints"):
        evaluate.evaluate_sets(replace(evaluate.of_run(whole, whole.out), max_problems=4))
        for folder in ("model", "adapter") if name == "model" else ():
            (whole.out / folder).rename(whole.out / f"moved_{folder}")
    assert texts[0] == texts[1]  # the adapter of the policy's folder is not added twice
    for change, message in (
        ({"lora": LoraConfig()}, r"rank 0, got .* with rank 4: set model\.lora to rank 4, alpha 8"),
        ({"lora": replace(ADAPTERS, alpha=9.0)}, r"set model\.lora to rank 4, alpha 8\.0, targets"),
    ):
        third = replace(second, out=second.out.with_name("third"))
        with pytest.raises(ValueError, match=message):
            run(replace(third, model=replace(third.model, **change)))


@pytest.mark.slow
def test_an_adapter_teaches_as_its_merged_model(config: Config) -> None:
    first = of(config, "first", steps=1)
    run(first)
    rows = []
    for name in ("adapter", "model"):
        student = config(f"by_{name}", steps=2)
        rows.append(run(replace_teacher(student, str(first.out / name))))
    assert_same_metrics(*rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what bitsandbytes and torch say of a CPU
def test_adapters_of_a_model_of_4_bits(config: Config, tiny: Any, tmp_path: Path) -> None:
    """As policy's base and as teacher; the head's layers are as wide as a block of 64 weights."""
    pytest.importorskip("bitsandbytes", reason="it is not installed")
    whole, quantised = tmp_path / "w", tmp_path / "q"
    tiny("llama", hidden=128, tie_word_embeddings=False).save_pretrained(whole)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        whole, quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(quantised)
    plain = config("run", policy="llama", steps=2, optim=OPTIM)
    AutoTokenizer.from_pretrained(plain.model.policy).save_pretrained(quantised)
    lora = LoraConfig(rank=4, alpha=8.0, merge=False)
    models = replace(plain.model, policy=str(quantised), teacher=str(quantised), lora=lora)
    one = replace(plain, model=models)
    for wrong, message in (
        ({"engine": EngineConfig(staleness=1)}, r"which only the engine generate takes"),
        ({"model": replace(models, lora=replace(lora, merge=True))}, r"set model\.lora\.merge to"),
        ({"model": replace(models, lora=LoraConfig())}, r"gradients reach only weights in 16"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(one, **wrong))
    rows = run(one)
    assert rows[0]["kl_teacher"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["kl_teacher"] > 1e-6
    assert all(row["sampler_mismatch_mean"] < 1e-3 for row in rows)
    stored = load_file(one.out / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in stored.values())
    assert not (one.out / "model").exists()
    measured = replace(evaluate.of_run(one, one.out), max_problems=2)
    assert evaluate.evaluate_sets(measured)["data"].problems == 2
