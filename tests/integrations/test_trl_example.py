"""The example of KdrlTrainer: the KL to the teacher falls; and the change that README.md shows."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from kdrl_kernels.integrations.trl import example
from tests.integrations.trl_runs import (
    OLD_NAMES,
    plain_settings,
    prompts,
    reward,
    small_model,
    tokenizer,
)

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


def test_the_kl_falls(capsys: pytest.CaptureFixture[str]) -> None:
    records = example.run(9, teacher_steps=40, student_steps=20)
    kls = [record["kdrl/kl"] for record in records]
    assert len(kls) == 3
    assert kls[2] < 0.9 * kls[0]
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if "KL to the teacher" in line]
    assert [line.split()[1] for line in shown] == ["3/9", "6/9", "9/9"]
    assert [float(line.split()[8]) for line in shown] == pytest.approx(kls, abs=1e-4)


def test_the_reward_is_that_of_the_right_answer() -> None:
    assert example.right(["7", "17", ""], ["7", "7", "7"]) == [1.0, 0.0, 0.0]
    assert len(example.SUMS) == 100
    assert ("3+4=", "7") in example.SUMS


def test_the_change_of_the_first_page_makes_a_trainer_that_distils(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (change,) = re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {
        "settings": plain_settings(tmp_path),
        "model": small_model(1),
        "right": reward,
        "data": prompts(),
        "teacher": small_model(2),
        "tokenizer": tokenizer(),
    }
    before, after = (
        "\n".join(line[1:] for line in change.splitlines() if line[0] in f"{sign} ")
        for sign in "-+"
    )
    coefficients = []
    for code in (before, after):
        run = dict(names)
        exec(code.replace("train_dataset=", "processing_class=tokenizer, train_dataset="), run)
        run["trainer"].train()
        log = [line for line in run["trainer"].state.log_history if "reward" in line]
        assert len(log) == 3
        coefficients.append([line.get("kdrl/kd_coef") for line in log])
    assert coefficients == [[None] * 3, [2e-3] * 3]
