"""Does the row work of the columns that this rank holds, and joins it with that of other ranks.

Numbers of rows travel between ranks, logits never. A row is that of the whole vocabulary to all who
ask for its statistics, coefficients and gradient. Maths: rows/README.md.
"""

from dataclasses import dataclass, field, replace
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kdrl_kernels import rows as row_work
from kdrl_kernels.caller_loss import TokenLoss
from kdrl_kernels.checks import poison
from kdrl_kernels.rows.best_columns import best_columns
from kdrl_kernels.rows.ids import IdStats, log_mass, rest_factor
from kdrl_kernels.rows.streams import NUMBERS, Stats, Stream, TeacherStream
from kdrl_kernels.token_rows import Coefficients, Rows

NO_MASS = 1e4
"""Nats: log_sum of a row whose columns here are all -inf, so that each probability is exp(-1e4)."""


@dataclass(frozen=True, slots=True)
class JoinedStats(Stats):
    """Holds statistics of whole rows, but for max, that of this rank's columns, and log_sum.

    log_sum is that of the whole row, relative to this max. So log p_v = (a_v - max) / temperature -
    log_sum holds, and with it every formula of the gradient.
    """

    row_lse: Tensor = field(kw_only=True)

    def lse(self, temperature: float | Tensor) -> Tensor:  # noqa: ARG002 (interface of Stats)
        """Return log(sum_v exp(z_v)) of the whole row, the same bits on all ranks."""
        return self.row_lse


def gather(values: Tensor, group: ProcessGroup) -> Tensor:
    """Return [ranks, ...], the values of each rank, which have one shape."""
    everyone = values.new_empty(group.size(), *values.shape)
    if values.numel():
        dist.all_gather(list(everyone.unbind()), values, group=group)
    return everyone


class VocabShard:
    """Computes what the row modules do, of rows whose columns are spread over the ranks of a group.

    Rank r holds `sizes[r]` columns, after those of the ranks before. All ranks must call the same
    methods in the same order.
    """

    def __init__(self, group: ProcessGroup, sizes: list[int], impl: str, device: torch.device):
        self.group, self.rank = group, group.rank()
        self.columns, self.vocab_size = sizes[self.rank], sum(sizes)
        ends = list(accumulate(sizes))
        self.start = ends[self.rank] - self.columns
        # each a kernel's argument: a copy from the host would wait for the GPU
        self.ends = torch.stack([torch.full((), end, device=device) for end in ends])
        self.work: ModuleType = row_work.load(impl)

    def sweep(
        self,
        student: Stream,
        tokens: Tensor,
        *,
        teacher: TeacherStream | None = None,
        entropy: bool = False,
        ids: Tensor | None = None,
        rest: bool = False,
    ) -> JoinedStats:
        """Compute statistics of whole rows, of whose columns tokens [C] and ids [C, K] are."""
        local, _ = self._here(tokens)
        options: dict[str, Any] = {}
        if ids is not None:
            options = {"ids": self._ids_here(ids)}
        pair = None if teacher is None or teacher.kd == "jsd" else _pair(teacher)
        stats: Stats = self.work.sweep(
            student, local, teacher=pair, entropy=entropy, rest=rest, **options
        )
        if teacher is not None and pair is None:
            alone = self.work.sweep(teacher, local, entropy=teacher.entropy, **options)
            stats = _beside(stats, alone)
        joined = self._join(stats, student, teacher, tokens, ids)
        if teacher is None or teacher.kd != "jsd":
            return joined
        parts = torch.stack(self.work.mixture_kl(student, teacher, joined))
        kl, mixture_kl = gather(parts, self.group).sum(dim=0)
        return replace(joined, kl=kl, mixture_kl=mixture_kl)

    def coefficients(
        self, loss: TokenLoss, rows: Rows, weights: Tensor
    ) -> tuple[Tensor, Coefficients | None]:
        """Return weighted losses and their derivatives: from whole rows, so the same everywhere."""
        result: tuple[Tensor, Coefficients | None] = self.work.coefficients(loss, rows, weights)
        return result

    def resume_(self, stream: Stream, stats: Stats) -> None:
        """Overwrite logits that were projected again with what sweep of one stream left of them."""
        self.work.resume_(stream, stats)

    def gradient(
        self,
        student: Stream,
        tokens: Tensor,
        stats: Stats,
        coef: Coefficients,
        *,
        out: Tensor,
        teacher: TeacherStream | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Write dL/dlogits of the columns here: arguments are those of the row modules.

        A token of another rank has no term c δ here, but its -c p: c goes to the place of -h.
        """
        local, here = self._here(tokens)
        c, at_ids = coef.logprobs, stats.at_ids
        lse = torch.where(here, 0, -c) if coef.lse is None else coef.lse - torch.where(here, 0, c)
        coef = replace(coef, logprobs=torch.where(here, c, 0), lse=lse)
        if at_ids is not None:
            at_ids = replace(at_ids, columns=self._ids_here(at_ids.columns))
            coef = _of_ids_here(coef, at_ids)
        stats = Stats(**{name: getattr(stats, name) for name in NUMBERS}, at_ids=at_ids)
        if teacher is not None and teacher.kd == "fkl":
            stats = replace(stats, forward_kl=stats.kl)
            if coef.kl is not None:
                coef = replace(coef, kl=torch.zeros_like(coef.kl), forward_kl=coef.kl)
        dz: Tensor = self.work.gradient(
            student,
            local,
            stats,
            coef,
            out=out,
            teacher=None if teacher is None else _pair(teacher),
            source=source,
        )
        return dz

    def best_columns(self, logits: Tensor, K: int) -> Tensor:
        """Return the K likeliest columns of whole rows, as best_columns of rows/ does."""
        local = best_columns(logits, K)
        values = logits.gather(1, local.clamp_min(0)).masked_fill_(local < 0, -torch.inf)
        columns = torch.where(local < 0, -1, local + self.start)
        # in the order of the ranks, so that of equal values the lowest column comes first
        values, columns = (
            gather(x, self.group).transpose(0, 1).flatten(1) for x in (values, columns)
        )
        order = values.sort(dim=1, descending=True, stable=True).indices
        return columns.gather(1, order[:, :K])

    def add_up_(self, values: Tensor) -> None:
        """Add the values of all ranks up, in place."""
        if values.numel():
            dist.all_reduce(values, group=self.group)

    def _here(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of tokens here, clamped to some column where they are elsewhere."""
        local = tokens - self.start
        here = (local >= 0) & (local < self.columns)
        return local.clamp(0, self.columns - 1), here

    def _ids_here(self, ids: Tensor) -> Tensor:
        """Return the columns of ids here; -1 where they are elsewhere, or none."""
        local, here = self._here(ids)
        return torch.where(here, local, -1)

    def _owner(self, columns: Tensor) -> Tensor:
        """Return the rank that holds each of the columns; some rank for -1."""
        return torch.bucketize(columns, self.ends[:-1], right=True)

    def _join(
        self,
        stats: Stats,
        student: Stream,
        teacher: TeacherStream | None,
        tokens: Tensor,
        ids: Tensor | None,
    ) -> JoinedStats:
        """Join the statistics of each rank's columns, each of a distribution of its own."""
        values = {name: getattr(stats, name) for name in NUMBERS}
        values["rest"] = None if stats.at_ids is None else stats.at_ids.rest
        values = {name: value for name, value in values.items() if value is not None}
        everyone = gather(torch.stack(list(values.values())), self.group).unbind(dim=1)
        each = dict(zip(values, everyone, strict=True))  # [ranks, C]
        owner = self._owner(tokens)[None]

        def of_token(logprobs: Tensor, mass: _Masses) -> Tensor:
            whole = torch.where(mass.log == -torch.inf, -torch.inf, logprobs + mass.log)
            return whole.gather(0, owner)[0]

        log_sums = poison(each["log_sum"], _copies(each["max"], each["log_sum"]))
        p = _Masses(each["max"], log_sums, student.temperature)
        joined: dict[str, Any] = {
            "max": stats.max,
            "log_sum": p.log_sum_from(self.rank),
            "logprobs": of_token(each["logprobs"], p),
            "row_lse": p.lse,
        }
        if stats.entropy is not None:
            joined["entropy"] = p.mean(each["entropy"] - p.log)
        if teacher is None:
            joined["at_ids"] = self._join_ids(stats.at_ids, ids, p, None, each.get("rest"))
            return JoinedStats(**joined)
        q = _Masses(each["teacher_max"], each["teacher_log_sum"], teacher.temperature)
        joined["teacher_max"] = values["teacher_max"]
        joined["teacher_log_sum"] = q.log_sum_from(self.rank)
        joined["teacher_logprobs"] = of_token(each["teacher_logprobs"], q)
        joined["at_ids"] = self._join_ids(stats.at_ids, ids, p, q, each.get("rest"))
        if stats.teacher_entropy is not None:
            joined["teacher_entropy"] = q.mean(each["teacher_entropy"] - q.log)
        if teacher.kd in ("rkl", "rkl+fkl"):
            joined["kl"] = p.divergence(q, each["kl"])
        if teacher.kd in ("fkl", "rkl+fkl"):
            name = "kl" if teacher.kd == "fkl" else "forward_kl"
            joined[name] = q.divergence(p, each["forward_kl"])
        return JoinedStats(**joined)

    def _join_ids(
        self,
        here: IdStats | None,
        ids: Tensor | None,
        p: "_Masses",
        q: "_Masses | None",
        rests: Tensor | None,
    ) -> IdStats | None:
        """Return log-probabilities at ids [C, K] of whole rows, from those at the ids here."""
        if here is None or ids is None:
            return None
        owner = self._owner(ids).T

        def joined(logprobs: Tensor | None, mass: "_Masses | None") -> Tensor | None:
            if logprobs is None or mass is None:
                return None
            nothing = mass.log[self.rank] == -torch.inf  # and the logprobs are NaN
            values = logprobs.masked_fill(nothing[:, None] & (here.columns >= 0), -torch.inf)
            self.add_up_(values)  # one rank has the column, the others 0
            return (values + mass.log.gather(0, owner).T).masked_fill_(ids < 0, 0)

        rest = None
        if rests is not None:
            rests = torch.where(p.log == -torch.inf, -torch.inf, rests + p.log)
            rest = log_mass(rests.logsumexp(dim=0)).masked_fill_((ids < 0).all(dim=1), 0)
        logprobs = joined(here.logprobs, p)
        assert logprobs is not None
        return IdStats(ids, logprobs, joined(here.teacher_logprobs, q), rest)


def _copies(tops: Tensor, log_sums: Tensor) -> Tensor:
    """Say, 0-d, whether neighbouring ranks have the same logits in every row, [ranks, C] each.

    Rows of weight on one rank alone do not: another rank's have other maxima and sums. Logits that
    are all 0, or all -inf, say nothing.

    Raises: ValueError on a CPU; on a GPU raising would wait for the device.
    """
    same = ((tops[1:] == tops[:-1]) & (log_sums[1:] == log_sums[:-1])).all(dim=1)
    same &= ((tops[1:] != 0) & (tops[1:] > torch.finfo(tops.dtype).min)).any(dim=1)
    if tops.device.type == "cpu" and same.any():
        rank = int(same.nonzero()[0])
        raise ValueError(
            f"weight must be the rows of one rank of vocab_group alone, got the same logits on the "
            f"ranks {rank} and {rank + 1}: pass each rank its part of a whole weight"
        )
    return same.any()


class _Masses:
    """Holds the share of each rank's columns in the probability of each row, [ranks, C]."""

    def __init__(self, tops: Tensor, log_sums: Tensor, temperature: float | Tensor) -> None:
        if isinstance(temperature, Tensor):
            temperature = temperature.to(tops.dtype)
        top = tops.amax(dim=0)
        self.shifts = (tops - top) / temperature
        self.log_sum = (log_sums + self.shifts).exp().sum(dim=0).log()
        self.lse = top / temperature + self.log_sum
        self.log = log_sums + self.shifts - self.log_sum
        self.share = self.log.exp()

    def log_sum_from(self, rank: int) -> Tensor:
        """Return the log-sum of whole rows relative to a rank's maximum, [C]."""
        log_sum = self.log_sum - self.shifts[rank]
        return torch.where(self.log[rank] == -torch.inf, NO_MASS, log_sum)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values [ranks, C] over the ranks, by share; 0 · NaN counts 0."""
        return torch.where(self.share == 0, 0, self.share * values).sum(dim=0)

    def divergence(self, other: "_Masses", inside: Tensor) -> Tensor:
        """Return KL of whole rows, [C], from those inside each rank's columns: the chain rule."""
        between = self.log - other.log
        return self.mean(torch.where(other.log == -torch.inf, torch.inf, inside + between))


def _of_ids_here(coef: Coefficients, here: IdStats) -> Coefficients:
    """Put what is a number times p of each column here into the derivative in the log-sum-exp.

    That is the derivative at an id that is not here, and all of the rest's in a row without ids.
    """
    absent, extra, rest, lse = here.columns < 0, coef.extra, coef.rest, coef.lse
    assert lse is not None
    if extra is not None:
        lse = lse - torch.where(absent, extra, 0).sum(dim=1)
        extra = extra.masked_fill(absent, 0)
    if rest is not None:
        none = absent.all(dim=1)
        lse = lse + torch.where(none, rest_factor(coef, here) - rest, 0)
        rest = rest.masked_fill(none, 0)
    return replace(coef, lse=lse, extra=extra, rest=rest)


def _beside(stats: Stats, teacher: Stats) -> Stats:
    """Put the statistics of a teacher that was swept alone beside the student's."""
    at_ids, other = stats.at_ids, teacher.at_ids
    if at_ids is not None and other is not None:
        at_ids = replace(at_ids, teacher_logprobs=other.logprobs)
    return replace(
        stats,
        teacher_max=teacher.max,
        teacher_log_sum=teacher.log_sum,
        teacher_logprobs=teacher.logprobs,
        teacher_entropy=teacher.entropy,
        at_ids=at_ids,
    )


def _pair(teacher: TeacherStream) -> TeacherStream:
    """Return a stream of both divergences in the place of "fkl".

    What the sweep of "fkl" leaves holds the sums of the columns here, not those of whole rows.
    """
    return replace(teacher, kd="rkl+fkl") if teacher.kd == "fkl" else teacher
