"""Holds the teachers of a run, each under its number: models in this process, and servers."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.batch import Example, Rollouts, TeacherReply
from kdrl_train.config.models import DEFAULT_TEACHER, REFERENCE
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.self_teacher import EmaTeacher, LiveTeacher
from kdrl_train.model.teacher.head import ServedHead
from kdrl_train.model.teacher.remote import RemoteTeacher
from kdrl_train.waiting import Poll


@dataclass(frozen=True, slots=True)
class Teachers:
    """The teachers of a run. A completion's teacher is a number, its place in `names`."""

    names: tuple[str, ...] = ()
    local: Mapping[int, Teacher | LiveTeacher] = field(default_factory=dict)
    """Number -> a model in this process."""
    remote: Mapping[int, RemoteTeacher] = field(default_factory=dict)
    """Number -> a server."""

    extrapolation: float = 1.0
    """lambda: a head is that of q^lambda · ref^(1 - lambda), where ref is the local REFERENCE."""
    several: bool = False
    """Whether problems are routed to them (model.teachers): each has metrics of its own then."""

    @property
    def routed(self) -> tuple[str, ...]:
        """The names of several teachers; empty where one teaches all problems, or none does."""
        taught = tuple(name for name in self.names if name != REFERENCE)  # which is the last
        return taught if self.several else ()

    def __bool__(self) -> bool:
        return bool(self.names)

    def numbers(self, examples: Sequence[Example]) -> Tensor:
        """Return the number of each example's teacher, [R] int64; 0 unless there are several."""
        if not self.several:
            return torch.zeros(len(examples), dtype=torch.int64)
        return torch.tensor(
            [self.names.index(example.teacher or DEFAULT_TEACHER) for example in examples]
        )

    def runs(self, batch: PackedBatch) -> bool:
        """Whether a pack needs the head of its teacher in this process."""
        return batch.needs_teacher and (
            batch.teacher in self.local or self._served_head(batch.teacher) is not None
        )

    def head(self, batch: PackedBatch) -> kk.TeacherHead | None:
        """Run the pack's teacher, or take the states that its server has sent; None where no token
        is distilled, or a server has scored them."""
        if not self.runs(batch):
            return None
        served = self._served_head(batch.teacher)
        if served is not None:
            return served.of(batch.teacher_states, len(batch.tokens))
        teacher = self.local[batch.teacher](batch)
        if self.extrapolation == 1:
            return teacher
        reference = self.local[self.names.index(REFERENCE)](batch)
        weights = (self.extrapolation, 1 - self.extrapolation)
        return kk.composite_teacher([teacher, reference], weights)

    def _served_head(self, number: int) -> ServedHead | None:
        """Return the head of a teacher behind a URL, where the method reads it."""
        remote = self.remote.get(number)
        return None if remote is None else remote.head

    @property
    def average(self) -> EmaTeacher | None:
        """The teacher whose weights follow the policy's; None: there is none."""
        averages = (one for one in self.local.values() if isinstance(one, EmaTeacher))
        return next(averages, None)

    def follow(self, policy: Policy) -> None:
        """Let the teacher that follows the policy do so, after an optimiser step."""
        if self.average is not None:
            self.average.follow(policy)

    def query(
        self, rollouts: Rollouts, selected_R: Tensor, number_R: Tensor
    ) -> dict[int, Future[TeacherReply]]:
        """Send completions to the servers among their teachers, without waiting for a reply.

        Args:
            selected_R: [R] bool, which of them.
            number_R: [R] int64, the teachers.
        Returns: completion -> the future of the server's reply.
        """
        pending: dict[int, Future[TeacherReply]] = {}
        for number, remote in self.remote.items():
            pending |= remote.query(rollouts, selected_R & (number_R == number))
        return pending

    def collect(
        self,
        rollouts: Rollouts,
        selected_R: Tensor,
        number_R: Tensor,
        pending: dict[int, Future[TeacherReply]],
        poll: Poll | None = None,
    ) -> list[TeacherReply | None]:
        """Wait for the servers' replies to the selected completions; those not pending are sent.

        Args:
            selected_R, number_R: as in `query`.
            pending: what `query` returned for the same rollouts; may be empty.
            poll: called regularly; an exception it raises stops the waiting.
        Returns: R of them, None where not selected or not of a server.
        Raises: TeacherError, that of the first query that failed.
        """
        missing_R = selected_R.clone()
        missing_R[list(pending)] = False
        pending = pending | self.query(rollouts, missing_R, number_R)
        replies: list[TeacherReply | None] = [None] * len(selected_R)
        for number, remote in self.remote.items():
            of_R = number_R == number
            theirs = {r: future for r, future in pending.items() if of_R[r]}
            part = remote.collect(rollouts, selected_R & of_R, theirs, poll)
            replies = [a if b is None else b for a, b in zip(replies, part, strict=True)]
        return replies
