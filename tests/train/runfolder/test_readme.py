"""The README of the run folder names the keys that a run writes, and no others."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

from kdrl_train import runfolder
from kdrl_train.config import (
    EngineConfig,
    EvalConfig,
    LogConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.method.presets import PRESETS
from kdrl_train.runfolder import jsonl
from tests.train.test_train import run

README = Path(runfolder.__file__).with_name("README.md")
OF_SEVERAL_TEACHERS = {
    f"{key}/NAME"
    for key in (
        *("kl_teacher", "teacher_log_ratio", "kd_coef", "kd_share"),
        *("rl_grad_norm", "kd_grad_norm", "rl_kd_cosine"),
    )
}
"""tests/train/test_teachers.py reads them."""
ONLY_ON_SEVERAL_RANKS = {"seconds_wait"}


def expanded(name: str) -> list[str]:
    """Write out the alternatives of a name: a_{b,c} -> a_b, a_c."""
    parts = re.split(r"\{(.*?)\}", name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def documented_keys() -> list[str]:
    """Read the keys in the first column of the README's table of metrics."""
    section = README.read_text(encoding="utf-8").split("## metrics.jsonl")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [
        key
        for row in rows
        for name in re.findall(r"`(.*?)`", row.split("|")[1])
        for key in expanded(name)
    ]


def test_every_key_of_a_run_is_in_the_readme(config: Callable[..., TrainConfig]) -> None:
    sampling = SamplingConfig(prompts_per_step=2, group_size=2, max_new_tokens=4)
    base = config(
        steps=2,
        sampling=sampling,
        samples_per_step=1,
        method=replace(PRESETS["kdrl_gap"], sampler_correction="truncate"),
        eval=EvalConfig(
            data=config().data, sets={"NAME": config().data}, every=1, samples=2, max_problems=2
        ),
        log=LogConfig(diagnostics_every=1),
    )
    base = replace(base, reward=RewardConfig(function="exact", workers=1))  # it reads answers
    prefetching = replace(
        base,
        out=base.out.with_name("prefetch"),
        method=replace(PRESETS["kdrl_topk"], sampler_correction="truncate"),
        engine=EngineConfig(staleness=1),
        model=replace(base.model, head_backward="sketch"),
        reward=RewardConfig(
            functions=("exact", "tests.train.scripted_rewards:short"), workers=1, overlong_buffer=2
        ),
    )
    written = {
        key for settings in (base, prefetching) for record in run(settings) for key in record
    }
    named = {"reward/exact", "reward/short"}
    assert named <= written
    written = written - named | {"reward/NAME"}
    documented = documented_keys()
    assert len(documented) == len(set(documented))
    assert set(documented) == written | ONLY_ON_SEVERAL_RANKS | OF_SEVERAL_TEACHERS
    text = README.read_text(encoding="utf-8")
    for name in ("events.jsonl", "samples/step_000001.jsonl"):
        for record in jsonl.read(base.out / name):
            assert not [key for key in record if f"`{key}`" not in text], name
    (row,) = [line for line in text.splitlines() if line.startswith("| `samples/")]
    (sample,) = jsonl.read(base.out / "samples/step_000001.jsonl")
    described = set(re.findall(r"`(\w+)`", row)) - {"samples_per_step"}
    assert described == set(sample) | {"teacher", "teacher_prompt"}  # of several, of a template
    (prompt,) = [e for e in jsonl.read(base.out / "events.jsonl") if e["event"] == "prompt"]
    assert prompt["step"] == 0
    assert prompt["message"] == "the first prompt, with its special tokens: '0+0='"
    files = {path.name for path in base.out.iterdir()}
    assert not [name for name in files if f"`{name}" not in text]
