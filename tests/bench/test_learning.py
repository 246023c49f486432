"""Tests bench/learning: the foil and the mask by hand, the runs on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.learning import __main__ as learning
from bench.learning.text import is_rare, stream_of
from bench.learning.trial import HeadGradient, Sizes, dropped_losses

SIZES = Sizes(vocab_size=280, hidden=16, layers=1, intermediate=16, length=8, sequences=2)
SIZES = replace(SIZES, steps=2, warmup=1, validation=40, rare_below=2)


def test_the_foil_drops_what_is_below_the_threshold_but_not_the_token() -> None:
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125]])
    hidden, tokens = p.log().requires_grad_(), torch.tensor([0, 3])
    losses, kept = dropped_losses(hidden, torch.eye(4), tokens, 0.2)
    (losses * torch.tensor([1.0, 2.0])).sum().backward()
    torch.testing.assert_close(losses, torch.tensor([0.5, 0.125]).log().neg())
    expected = torch.tensor([[-0.5, 0.25, 0, 0], [1.0, 0.5, 0, -1.75]])
    torch.testing.assert_close(hidden.grad, expected)
    assert kept == 5


def test_without_a_threshold_the_foil_is_the_exact_gradient() -> None:
    torch.manual_seed(0)
    tokens, gradients = torch.randint(9, (5,)), []
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    for one in (HeadGradient("exact"), HeadGradient("dropped", 0.0)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, entries = one.loss(*leaves, tokens, seed=0)
        loss.backward()
        gradients.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        assert entries == 9
    torch.testing.assert_close(*gradients)


def test_a_coarser_sketch_keeps_fewer_entries_and_the_loss() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(512, 4)
    tokens = torch.randint(512, (6,))
    runs = [
        HeadGradient(kind, threshold).loss(hidden, weight, tokens, seed=1)
        for kind, threshold in (("exact", 0), ("sketch", 0.1), ("sketch", 1))
    ]
    torch.testing.assert_close(runs[0][0], runs[1][0])
    assert [entries for _, entries in runs[::2]] == [512, pytest.approx(2, abs=0.4)]
    assert 8 < runs[1][1] < 12.1  # 1 / threshold, and the token


def test_a_token_is_rare_by_how_often_it_was_seen() -> None:
    seen = torch.tensor([3, 3, 3, 1, 1, 0])
    tokens = torch.tensor([0, 1, 2, 3, 7])
    assert is_rare(tokens, seen, 3).tolist() == [True, True, True, False, True]
    assert is_rare(tokens, seen, 2).tolist() == [True, False, True, False, True]


def test_the_seed_orders_the_documents() -> None:
    documents = [torch.tensor([i, i]) for i in range(8)]
    streams = [stream_of(documents, 15, seed).tolist() for seed in (0, 0, 1)]
    assert streams[0] == streams[1] != streams[2]
    assert sorted(streams[0][:14:2]) == sorted(set(streams[0][:14:2]))  # each document once
    with pytest.raises(ValueError, match="must have 17 tokens, got 16"):
        stream_of(documents, 17, 0)


def test_the_best_rate_is_that_of_the_exact_gradient_at_seed_0() -> None:
    runs = [("exact", 0.1, 0, 4.0), ("exact", 0.3, 0, 3.0), ("exact", 1.0, 0, 5.0)]
    runs += [("exact", 0.1, 1, 2.0), ("sketch 2^-6", 0.1, 0, 1.0)]
    records = [
        {"gradient": name, "optimizer": "sgd", "rate": rate, "seed": seed, "all": loss}
        for name, rate, seed, loss in runs
    ]
    assert learning.best_rate(records, "sgd") == 0.3
    exact, *_ = learning.compared(records[3:4] + records[:1], "sgd").values()
    assert [one["all"] for one in exact] == [4.0, 2.0]  # by seed


def test_a_difference_is_paired_and_has_students_interval() -> None:
    exact, other = ([{"all": loss} for loss in losses] for losses in ((4.0, 5.0), (4.1, 5.3)))
    # mean 0.2, standard error 0.1, t = 12.706 at one degree of freedom
    assert learning.difference(other, exact, "all") == "+0.200 (-1.071 to +1.471)"
    assert learning.difference(other[:1], exact[:1], "all") == "+0.100"


def test_runs_are_done_once_and_compared_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "test"):
        rows = [{"question": f"{i} and {name}", "answer": "7 clips " * 9} for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(learning, "RATES", {"adamw": (1e-3, 1e-2), "sgd": (0.1,)})
    monkeypatch.setattr(learning, "GRADIENTS", learning.GRADIENTS[::2])
    out = tmp_path / "out"
    learning.compare(out, tmp_path, SIZES, seeds=2)
    first = json.loads((out / "results.json").read_text())
    assert len(first["records"]) == 13  # 2 optimizers, 3 gradients, 2 seeds; a rate is left behind
    assert all(0 < one["all"] < 7 and one["rare_tokens"] for one in first["records"])
    assert (out / "learning.md").read_text().count(" to ") == 8
    assert {path.name for path in out.glob("*.svg")} == {"adamw.svg", "sgd.svg"}

    kept = first["records"][:-1]
    (out / "results.json").write_text(json.dumps(first | {"records": kept}))
    learning.compare(out, tmp_path, SIZES, seeds=2)
    again = json.loads((out / "results.json").read_text())
    assert again["records"] == first["records"]  # the last one was done anew, alike to the bit
    with pytest.raises(ValueError, match="give another folder"):
        learning.open_results(out, replace(SIZES, steps=3))


def test_the_readme_has_the_committed_table() -> None:
    folder = Path(learning.__file__).parents[1] / "results/learning-cpu"
    readme = (folder / "README.md").read_text("utf-8").splitlines()
    rows = (folder / "learning.md").read_text("utf-8").splitlines()[4:]
    assert len(rows) == 12  # heading, rule, 2 optimizers of 5 gradients
    assert [row for row in rows if row not in readme] == []
