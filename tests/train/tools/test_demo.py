"""demo: a tiny setting from end to end, and the numbers that it reports."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl_train.method.presets import PRESETS
from kdrl_train.rollouts.problems import load_examples
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts
from kdrl_train.runfolder.log import read_records
from kdrl_train.tools import demo
from kdrl_train.tools.demo import DemoConfig
from kdrl_train.tools.toy import ArithmeticConfig
from kdrl_train.tools.toy.models import ArchitectureConfig

CONFIG = DemoConfig(
    seed=1,
    task=ArithmeticConfig(min_steps=1, max_steps=2, max_operand=3, max_total=5),
    problems=40,
    held_out=6,
    samples=2,
    teacher=ArchitectureConfig(hidden=32, layers=1, heads=2, kv_heads=2, intermediate=64),
    teacher_steps=20,
    student=ArchitectureConfig(hidden=16, layers=1, heads=2, kv_heads=2, intermediate=32),
    student_steps=20,
    slips=0.5,
    sft_batch_tokens=256,
    steps=2,
    prompts_per_step=4,
    group_size=2,
    max_new_tokens=8,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.DemoResult, Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=100)
    threads = torch.get_num_threads()
    result = demo.main(replace(CONFIG, out=out), console)
    assert torch.get_num_threads() == threads
    return result, out, console.file.getvalue()


def test_the_run_is_kdrl_with_exact_kl_and_a_falling_beta(finished) -> None:
    result, out, _ = finished
    records = read_records(result.run)
    assert result.run == out / "run"
    assert [record["kd_coef"] for record in records] == pytest.approx([0.5, 0.275])
    config = demo.train_config(CONFIG, out)
    assert replace(config.method, kd="k2", kd_coef=PRESETS["kdrl"].kd_coef) == PRESETS["kdrl"]
    assert config.method.kd == "rkl"


def test_student_and_run_differ_and_result_json_is_the_result(finished) -> None:
    result, out, _ = finished
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight
        for folder in (out / "student", out / "run" / "model")
    )
    assert not torch.equal(before, after)
    saved = json.loads((out / "result.json").read_text())
    assert saved["after"]["kl"] == result.after.kl
    assert saved["before"]["accuracy"] == result.before.accuracy
    parts = sum(seconds for part, seconds in saved["seconds"].items() if part != "total")
    assert saved["seconds"]["total"] == pytest.approx(parts)


def test_the_table_shows_the_result(finished) -> None:
    result, out, text = finished
    table = text[text.rindex("KDRL, 2 steps; 6 held-out problems") :]
    for name, measurement in (
        ("student before", result.before),
        ("student after", result.after),
        ("teacher", result.teacher),
    ):
        line = next(line for line in table.splitlines() if line.startswith(f"│ {name} "))
        cells = [cell.strip() for cell in line.split("│")[2:-1]]
        assert cells == [
            f"{measurement.accuracy:.1%}",
            f"{measurement.length:.1f}",
            f"{measurement.truncated:.1%}",
            f"{measurement.kl:z.4f}",
        ]
    assert f"{100 * (result.after.accuracy - result.before.accuracy):+.1f} points" in table
    assert str(out / "run") in "".join(line.strip() for line in table.splitlines())


def test_measured_problems_are_not_learnt_and_slips_keep_the_answer(finished) -> None:
    _, out, _ = finished
    train, sloppy, held_out = (
        [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "sloppy", "held_out")
    )
    assert (len(train), len(sloppy), len(held_out)) == (40, 40, 6)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    for right, row in zip(train, sloppy, strict=True):
        assert (row["question"], row["answer"]) == (right["question"], right["answer"])
        assert right["solution"].endswith(f"#### {right['answer']}")
    assert sum(a["solution"] != b["solution"] for a, b in zip(train, sloppy, strict=True)) > 10


def test_kl_is_that_of_the_full_distributions(finished) -> None:
    """Recomputes the KL on the same completions, from the models' logits, one at a time."""
    result, out, _ = finished
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(out / name).eval() for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    config = demo.train_config(replace(CONFIG, out=out), out)
    prompts = [
        tokenizer(example.prompt)["input_ids"]
        for example in load_examples(demo.data_config(out / "held_out.jsonl"))
    ]
    sampling = replace(config.sampling, group_size=1)
    request = SampleRequest(prompts=prompts, sampling=sampling, seed=1, step=demo.KL_STEP)
    rollouts = generate_rollouts(student, tokenizer, request)
    kls = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            logp, logq = (
                F.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double(), dim=-1)
                for model in (student, teacher)
            )
        kls.append((logp.exp() * (logp - logq)).sum(dim=-1))
    assert result.before.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)
    assert result.before.kl > 1e-3
    assert result.teacher.kl == pytest.approx(0.0, abs=1e-6)


def test_folders(tmp_path: Path) -> None:
    assert demo.free_folder(tmp_path) == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert demo.free_folder(tmp_path) == tmp_path / "demo-3"
    with pytest.raises(ValueError, match=r"out must be a new folder, got .*demo, which exists"):
        demo.main(DemoConfig(out=tmp_path / "demo"), Console(quiet=True))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        DemoConfig(steps=0)
