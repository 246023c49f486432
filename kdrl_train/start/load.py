"""Loads what a run needs before it can be checked: models, tokenizers and problems."""

from dataclasses import dataclass
from typing import Any

from kdrl_train.batch import Example
from kdrl_train.config import TrainConfig
from kdrl_train.model.load import load_policy, load_teacher, load_tokenizer
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.teacher.client import TeacherClient, connect
from kdrl_train.ranks import ALONE, World
from kdrl_train.rollouts.problems import load_examples


@dataclass(frozen=True, slots=True)
class Loaded:
    """Holds the models, tokenizers and problems of a run, which the preflight checks."""

    tokenizer: Any
    policy: Policy
    teacher_tokenizer: Any | None
    teacher: Teacher | None
    examples: list[Example]
    held_out: list[Example]
    """The problems of the evaluation during training; empty where it is off."""
    server: TeacherClient | None = None
    """The connection to a teacher behind a URL; `teacher` is None then."""

    def close(self) -> None:
        """Close the connections to the teacher's server."""
        if self.server is not None:
            self.server.close()


def load(config: TrainConfig, world: World = ALONE, policy_class: type[Policy] = Policy) -> Loaded:
    """Load the models, tokenizers and problems of a run; all ranks call this together.

    policy_class: Policy, or a subclass with another loss.

    Raises: ValueError or OSError for what cannot be loaded; with several ranks a model that cannot
        be loaded raises RankError.
    """
    examples, held_out = load_examples(config.data), []
    if config.eval.every and config.eval.data.path:
        held_out = load_examples(config.eval.data)[: config.eval.max_problems]
    teacher = server = None
    if config.method.kd is not None and config.model.teacher_is_url:
        server = connect(config.model, config.teacher)
    else:
        teacher = load_teacher(config, world)
    policy = load_policy(config, server or teacher, world, policy_class)
    return Loaded(
        tokenizer=load_tokenizer(config.model.policy),
        policy=policy,
        teacher_tokenizer=None if teacher is None else load_tokenizer(str(config.model.teacher)),
        teacher=teacher,
        examples=examples,
        held_out=held_out,
        server=server,
    )
