"""Tests the verdicts, tables and pages of a study."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.study import analysis, plots, results, tables, write_up
from bench.study.analysis import CLAIMS, Claim, Study
from bench.study.arms import ARMS
from bench.study.config import StudyConfig
from bench.study.statistics import MeanOverSeeds
from bench.study.trial import TrialResult
from tests.bench.study.study_results import result


def three_seeds(mean: float, low: float, high: float) -> MeanOverSeeds:
    return MeanOverSeeds(mean, low, high, seeds=3)


@pytest.mark.parametrize(
    ("difference", "expected", "kept"),
    [
        (three_seeds(0.05, 0.03, 0.07), "as in the paper", "differs from the paper"),
        (three_seeds(0.01, 0.005, 0.015), "as in the paper", "as in the paper"),
        (three_seeds(0.0, -0.01, 0.01), "not decided here", "as in the paper"),
        (three_seeds(0.0, -0.2, 0.2), "not decided here", "not decided here"),
        (three_seeds(-0.01, -0.03, 0.01), "not decided here", "not decided here"),
        (three_seeds(-0.05, -0.07, -0.03), "differs from the paper", "differs from the paper"),
        (MeanOverSeeds(0.05, 0.03, 0.07), "one seed: not judged", "one seed: not judged"),
    ],
)
def test_verdicts_on_more_and_on_kept(difference: MeanOverSeeds, expected: str, kept: str) -> None:
    assert {one.arm for one in CLAIMS} | {one.other for one in CLAIMS} <= set(ARMS)
    assert analysis.verdict(CLAIMS[0], difference) == expected
    assert analysis.verdict(Claim("?", "a", "b", "kept", expected=0), difference) == kept


def test_what_the_paper_leaves_open_has_no_verdict_but_a_sign() -> None:
    one = Claim("?", "a", "b", "")
    assert analysis.verdict(one, three_seeds(-0.1, -0.2, -0.05)) == "less"
    assert analysis.verdict(one, three_seeds(0.0, -0.2, 0.2)) == "not decided here"


def test_what_differs_from_the_paper_is_said_first() -> None:
    wins, draws, loses = "4444", "0123", "0000"
    right = {"kdrl": draws, "grpo": wins, "kd_rkl": loses, "kdrl_k3": draws, "kdrl_exact": wins}
    study = Study(
        result(arm, digits, seed=seed) for arm, digits in right.items() for seed in range(3)
    )
    judged = analysis.judge(study, "arithmetic")
    assert [one.claim.question for one in judged] == [
        "KDRL against GRPO", "distillation against GRPO", "k2 against k3",
        "KDRL against distillation", "exact KL against k2, in KDRL",
    ]  # fmt: skip
    assert write_up.conclusion(study, "arithmetic") == (
        "On arithmetic. Differs from the paper: KDRL against GRPO; distillation against GRPO. Not "
        "decided here: k2 against k3. As in the paper: KDRL against distillation."
    )


def test_differences_are_paired_by_seed() -> None:
    runs = [result("kdrl", "2222", seed=0), result("kdrl", "4444", seed=1)]
    runs += [result("grpo", "1111", seed=0), result("grpo", "3333", seed=1)]
    runs += [result("grpo", "0000", seed=2)]  # kdrl has no such seed
    study = Study(runs)
    assert study.difference("arithmetic", "kdrl", "grpo") == MeanOverSeeds(0.25, 0.25, 0.25, 2)
    shorter = study.pairs("arithmetic", "kdrl", "grpo", "length")
    assert shorter is not None
    assert shorter.tolist() == [[0.0], [0.0]]
    assert study.tokens_to("arithmetic", "grpo", 1.0)[0] == 1600
    sampled_elsewhere = replace(result("sft"), curve={}, sampled_tokens=5)
    assert Study([sampled_elsewhere]).tokens_to("arithmetic", "sft", 0.1) == []


def test_a_sketched_arm_is_compared_with_the_arm_that_it_is_like(tmp_path: Path) -> None:
    """GRPO loses one problem of four at seed 0 and none at seed 1; entries are 2 and 3."""
    runs = [result(arm, "4444", seed=seed) for arm in ("grpo", "kdrl") for seed in (0, 1, 2)]
    runs += [result("grpo_sketch", "4440"), result("grpo_sketch", "4444", seed=1)]
    better = result("kdrl_sketch", "4444", seed=2)
    curve = better.curve | {"accuracy": [0.1 * i + 0.03 for i in range(20)]}
    runs += [replace(better, curve=curve)]
    runs += [result("kdrl_exact_sketch", "4444")]  # its twin has not run
    sections = write_up.make_sections(Study(runs), StudyConfig(out=tmp_path), ["arithmetic"])
    (section,) = [one for one in sections if "a sketch of" in one.table.title]
    rows = [[cell.split(" (")[0] for cell in row] for row in section.table.rows]
    assert rows == [
        ["grpo", "-12.5", "-25.0, +0.0", "+0.0", "2.5", "0.25"],
        ["kdrl", "+0.0", "+0.0", "+3.0", "4.0", "0.25"],
        ["all", "-8.3", "-25.0, +0.0, +0.0", "+1.0", "3.2", "0.25"],
    ]
    assert "grpo: 2.5 entries, noise 0.25 -12.5" in section.plots["sketch_arithmetic"]


def test_settings_at_an_end_of_their_sweep_are_marked(tmp_path: Path) -> None:
    """A sweep may end past the values of the config; k1_as_loss has the sweep of kdrl."""
    tried = ((2.5e-4, 0.2), (5e-4, 0.2), (1e-3, 0.2), (5e-4, 0.02), (5e-4, 2.0), (5e-4, 20.0))
    runs = [
        result("kdrl", learning_rate=rate, beta=beta, seed=1000, sweep=True) for rate, beta in tried
    ]
    runs += [
        result(arm, learning_rate=5e-4, beta=beta, seed=seed)
        for seed, (arm, beta) in enumerate((("kdrl", 20.0), ("k1_as_loss", 20.0)))
    ]
    rows = tables.arms(Study(runs), StudyConfig(out=tmp_path), "arithmetic").rows
    assert [row[:3] for row in rows] == [["kdrl", "0.0005", "20*"], ["k1_as_loss", "0.0005", "20*"]]
    inside = [result("kdrl", learning_rate=5e-4, beta=2.0), *runs[:-2]]
    rows = tables.arms(Study(inside), StudyConfig(out=tmp_path), "arithmetic").rows
    assert rows[0][1:3] == ["0.0005", "2"]


def test_a_stage_of_half_the_steps_costs_half_a_step() -> None:
    one = result("opd_then_rl")
    seconds = {"seconds_rollout": [2.0, 2.0, 2.0, 9.0], "seconds_teacher": [1.0, 1.0, None, None]}
    study = Study([replace(one, curve=one.curve | seconds)])
    assert study.stage_seconds("arithmetic", "opd_then_rl") == {"rollout": 2.0, "teacher": 0.5}
    assert tables.cost(study, "arithmetic").rows[0][-2:] == ["2.500", "1.25"]


def test_tokens_until_half_way_and_until_the_teacher() -> None:
    runs = [result("student", "0000"), result("teacher", "4444"), result("grpo", "2222")]
    study = Study([*runs[:2], replace(runs[2], sampled_tokens=2000)])
    table = tables.reached(study, "arithmetic")
    assert table.columns[2:] == ["half way: 50.0%", "teacher: 100.0%"]
    assert table.rows == [["grpo", "2", "1", "2"]]  # 0.1 more each step of 100 tokens


def test_a_page_and_tables_of_a_half_finished_study(tmp_path: Path) -> None:
    config = StudyConfig(out=tmp_path, seeds=1)
    bad = replace(
        result("kd_rkl", learning_rate=1e-3),
        status="crashed", error=f"boom | {tmp_path}/x", scores={},
    )  # fmt: skip
    runs = [result("student"), result("grpo", learning_rate=1e-3), bad]
    runs += [result("teacher"), result("kdrl", "4444", learning_rate=1e-3, beta=0.2)]
    sweeps = [
        result("kdrl", learning_rate=1e-3, beta=b, seed=1000, sweep=True) for b in (0.02, 0.2)
    ]
    saved = results.save(config, {r.trial: r for r in [*runs, *sweeps]})
    sections = write_up.make_sections(Study(saved["trials"]), config, ["arithmetic"])
    text = write_up.markdown(["about"], sections)
    assert "KDRL against GRPO | kdrl - grpo | +62.5" in text
    assert "| +62.5 | 56.8 against 54.6 | one seed: not judged |" in text
    assert "kd_rkl/middle-lr0.001-seed0 | boom \\| x" in text
    assert {name for section in sections for name in section.plots} == {
        "differences_arithmetic", "accuracy_arithmetic", "beta", "cost_arithmetic",
    }  # fmt: skip
    read_back = [TrialResult.read(_written(r, tmp_path)) for r in runs]
    assert read_back == runs


def test_every_question_of_the_paper_has_a_table_and_a_plot(tmp_path: Path) -> None:
    config = StudyConfig(out=tmp_path)
    runs = [
        result(arm, seed=seed, beta=0.2 if ARMS[arm].tuned else None)
        for arm in ARMS for seed in range(2)
    ]  # fmt: skip
    runs += [result(arm, teacher=t) for arm in ("teacher", "kdrl") for t in ("weak", "strong")]
    sections = write_up.make_sections(Study(runs), config, ["arithmetic"])
    assert len(sections[0].table.rows) == len(CLAIMS)
    assert set(plots.QUESTIONS) <= {name.removesuffix("_arithmetic") for name in sections[0].plots}
    assert all(section.plots for section in sections if "until" not in section.table.title)


def _written(one: TrialResult, folder: Path) -> Path:
    one.write(folder / "result.json")
    return folder / "result.json"
