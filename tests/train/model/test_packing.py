"""packing: what stands where in a packed row, and which completions share one."""

from typing import Any

import pytest
import torch

from kdrl_train.batch import CompletionCoefficients, Rollouts
from kdrl_train.model.packing import PackedBatch, balance, first_fit, pack
from tests.train.coefficients import uniform


def rollouts() -> Rollouts:
    """Two prompts of 2 and 1 tokens, completions of 3 and 1, log-probs that name their token."""
    completions = [torch.tensor([12, 13, 14]), torch.tensor([22])]
    return Rollouts(
        prompt_ids=[torch.tensor([10, 11]), torch.tensor([21])],
        completion_ids=completions,
        logprobs=[-c / 100 for c in completions],
        truncated=torch.tensor([False, True]),
        texts=["", ""],
    )


def packed(
    weights: tuple[float, float] = (1.0, 1.0),
    budget: int = 100,
    kd_weight: tuple[float, float] = (0.0, 0.1),
    **options: Any,
) -> list:
    coefficients = CompletionCoefficients(
        advantages=torch.tensor([0.5, -0.5]),
        token_weights=torch.tensor(weights),
        kd_weight=torch.tensor(kd_weight),
        **options,
    )
    return list(pack(rollouts(), coefficients, budget))


def test_one_row_by_hand() -> None:
    (row,) = packed()
    # the last token of a completion predicts nothing and is not fed
    assert row.input_ids.tolist() == [[10, 11, 12, 13, 21]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0]]
    assert row.loss_index.tolist() == [1, 2, 3, 4]
    assert row.tokens.tolist() == [12, 13, 14, 22]
    assert row.rollout.tolist() == [0, 0, 0, 1]
    assert row.advantages.tolist() == [0.5, 0.5, 0.5, -0.5]
    torch.testing.assert_close(row.sampled_logprobs, -row.tokens / 100)
    torch.testing.assert_close(row.kd_weight, torch.tensor([0.0, 0.0, 0.0, 0.1]))
    assert row.needs_teacher


def test_a_budget_cuts_the_step_and_only_rows_with_kd_need_a_teacher() -> None:
    first, second = packed(budget=4)
    assert first.tokens.tolist() == [12, 13, 14]
    assert second.tokens.tolist() == [22]
    assert second.loss_index.tolist() == [0]
    assert [first.needs_teacher, second.needs_teacher] == [False, True]


def test_completions_of_weight_zero_are_left_out() -> None:
    (row,) = packed(weights=(1.0, 0.0))
    assert row.rollout.tolist() == [0, 0, 0]
    assert not packed(weights=(0.0, 0.0))


def test_scores_of_a_server_stand_at_their_tokens() -> None:
    scores = [None, torch.tensor([-7.0])]
    (row,) = packed(teacher_logprobs=scores)
    assert row.teacher_logprobs[:3].isnan().all()  # not asked for: their kd weight is 0
    assert row.teacher_logprobs[3] == -7
    assert row.to("cpu").teacher_logprobs[3] == -7
    first, second = packed(budget=4, teacher_logprobs=scores)
    assert first.teacher_logprobs is None
    assert second.teacher_logprobs.tolist() == [-7]
    assert packed()[0].to("cpu").teacher_logprobs is None


def test_states_of_a_server_stand_at_their_tokens() -> None:
    (row,) = packed(teacher_states=[None, torch.tensor([[1.0, 2.0]])])
    assert row.teacher_states[:3].eq(0).all()
    assert row.teacher_states[3].tolist() == [1.0, 2.0]
    first, _ = packed(budget=4, teacher_states=[None, torch.zeros(1, 2)])
    assert first.teacher_states is None


def test_completions_of_two_teachers_are_packed_apart() -> None:
    first, second = packed(teacher=torch.tensor([1, 0]))
    assert (first.teacher, first.tokens.tolist()) == (0, [22])
    assert (second.teacher, second.tokens.tolist()) == (1, [12, 13, 14])
    one = uniform(2, teacher=torch.tensor([1, 0]))
    turns = [list(pack(rollouts(), one, 100, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [[row.teacher for row in rows] for rows in turns] == [[0, 1], [0, 1]]
    assert [[len(row.tokens) for row in rows] for rows in turns] == [[1, 3], [0, 0]]


def test_a_teacher_reads_its_prompts_before_the_same_completions() -> None:
    prompts = [torch.tensor([5]), torch.tensor([6, 7, 8])]
    (row,) = packed(teacher_prompts=prompts)
    theirs = row.to("cpu").teacher_inputs
    assert theirs.input_ids.tolist() == [[5, 12, 13, 6, 7, 8]]
    assert theirs.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert theirs.loss_index.tolist() == [0, 1, 2, 5]
    assert theirs.lengths == (3, 3)
    assert packed()[0].teacher_inputs is None


def test_ends_of_completions_are_distilled_unless_told_not_to() -> None:
    distilled = (0.2, 0.1)
    (row,) = packed(kd_weight=distilled)
    torch.testing.assert_close(row.kd_weight, torch.tensor([0.2, 0.2, 0.2, 0.1]))
    (row,) = packed(kd_weight=distilled, distil_eos=False)  # the second completion was cut
    torch.testing.assert_close(row.kd_weight, torch.tensor([0.2, 0.2, 0.0, 0.1]))


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_packs_hold_everything_once_within_the_budget(budget: int) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (50,), generator=draw).tolist()
    packs = first_fit(lengths, budget)
    assert sorted(i for members in packs for i in members) == list(range(50))
    for members in packs:
        assert len(members) == 1 or sum(lengths[i] for i in members) <= budget
    # first fit decreasing: no two packs could be one (the best has at most 2 half-full)
    loads = sorted(sum(lengths[i] for i in members) for members in packs)
    assert len(loads) == 1 or loads[0] + loads[1] > budget


def test_balance_by_hand() -> None:
    # 9 | 7 | 7 5 | 9 4 | 7 5 3 | 9 4 2: sums of 15
    assert balance([2, 9, 5, 4, 7, 3], 2) == [[0, 1, 3], [2, 4, 5]]
    assert balance([3, 3], 3) == [[0], [1], []]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("budget", [1, 40])
def test_ranks_divide_the_completions(ranks: int, budget: int) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (9,), generator=draw).tolist()
    whole = Rollouts(
        prompt_ids=[torch.tensor([5, 6])] * 9,
        completion_ids=[torch.arange(length) + 10 for length in lengths],
        logprobs=[torch.zeros(length) for length in lengths],
        truncated=torch.zeros(9, dtype=torch.bool),
        texts=[""] * 9,
    )
    kd_weight = torch.tensor([0.0] * 8 + [1.0])
    weights = torch.tensor([1.0, 0.0] + [1.0] * 7)

    def rows(rank: int) -> list[PackedBatch]:
        coefficients = CompletionCoefficients(
            advantages=torch.arange(9.0), kd_weight=kd_weight, token_weights=weights
        )
        return list(pack(whole, coefficients, budget, rank=rank, ranks=ranks))

    parts = [rows(rank) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # the same number of turns
    seen = torch.cat([row.rollout for part in parts for row in part])
    expected = [0 if r == 1 else length for r, length in enumerate(lengths)]
    assert seen.bincount(minlength=9).tolist() == expected
    for turn in zip(*parts, strict=True):
        distilled = any((row.kd_weight > 0).any() for row in turn)
        assert [row.needs_teacher for row in turn] == [distilled] * ranks
        for row in turn:
            assert row.input_ids.shape == row.position_ids.shape
            assert row.input_ids.numel() >= 1
            assert len(row.loss_index) == len(row.tokens) == len(row.advantages)
    loads = [sum(len(row.tokens) for row in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths) + 2


def test_a_turn_without_completions_feeds_one_token_and_learns_from_none() -> None:
    coefficients = CompletionCoefficients(
        advantages=torch.ones(2),
        kd_weight=torch.ones(2),
        token_weights=torch.tensor([1.0, 0.0]),
    )
    first, second = (
        list(pack(rollouts(), coefficients, 100, rank=rank, ranks=2)) for rank in range(2)
    )
    assert [row.rollout.tolist() for row in first] == [[0, 0, 0]]
    (row,) = second
    assert row.input_ids.tolist() == [[0]]
    assert row.position_ids.tolist() == [[0]]
    for name in ("loss_index", "tokens", "rollout", "sampled_logprobs", "advantages", "kd_weight"):
        assert getattr(row, name).shape == (0,), name
    assert row.tokens.dtype == row.loss_index.dtype == torch.int64
    assert row.needs_teacher  # the other rank's completion is distilled
    moved = row.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.needs_teacher


@pytest.mark.parametrize(
    ("kd_weight", "advantages", "factors", "expected"),
    [
        ((0.0, 0.1), (0.5, -0.5), None, (4, False, True)),
        ((0.2, 0.1), (0.0, 0.0), None, (4, True, True)),
        ((0.0, 0.1), (0.0, 0.5), None, (4, False, False)),
        ((0.0, 0.1), (0.0, 0.5), [1.0, 0.0, 2.0], (3, False, False)),
        ((0.0, 0.1), (0.0, 0.5), [0.0, 0.0, 0.0], (1, True, True)),  # nothing else counts
    ],
)
def test_a_pack_says_how_many_rows_count_and_whether_all_learn(
    kd_weight: tuple[float, float],
    advantages: tuple[float, float],
    factors: list[float] | None,
    expected: tuple[int, bool, bool],
) -> None:
    """Of a GPU these numbers would have to be waited for."""
    weights = None if factors is None else {0: torch.tensor(factors), 1: torch.ones(1)}
    coefficients = CompletionCoefficients(
        advantages=torch.tensor(advantages),
        token_weights=torch.ones(2),
        kd_weight=torch.tensor(kd_weight),
        sampler_weights=weights,
    )
    (row,) = pack(rollouts(), coefficients, 100)
    assert (row.active_rows, row.all_distilled, row.all_learn) == expected
    assert row.to("cpu").active_rows == expected[0]
