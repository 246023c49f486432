"""Loads what a run needs before it can be checked: models, tokenizers and problems."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdrl_train import output
from kdrl_train.batch import Example
from kdrl_train.config import DataConfig, TrainConfig
from kdrl_train.config.models import SELF, is_url
from kdrl_train.config_file import differences, to_dict
from kdrl_train.method.loss_trial import try_loss
from kdrl_train.model.folder import require_loadable
from kdrl_train.model.load import (
    load_policy,
    load_teacher,
    load_tokenizer,
    require_adaptable,
    use_device,
)
from kdrl_train.model.mover import Mover
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.self_teacher import BaseTeacher, LiveTeacher, has_no_copy
from kdrl_train.model.teacher.client import TeacherClient
from kdrl_train.model.teacher.head import ServedHead, load_head
from kdrl_train.model.teacher.openai import connect
from kdrl_train.model.window import window
from kdrl_train.ranks import ALONE, World
from kdrl_train.rollouts.problems import (
    ProblemSet,
    PromptFacts,
    encode_all,
    load_examples,
)
from kdrl_train.rollouts.rendering import PromptError
from kdrl_train.rollouts.routing import require_teachers
from kdrl_train.rollouts.teacher_prompts import encode_teacher_prompts
from kdrl_train.runfolder.checkpoint import load_weights
from kdrl_train.start.optimizer import require_optimizer


@dataclass(frozen=True, slots=True)
class LoadedTeacher:
    """Holds one teacher: a model with its tokenizer, or the connection to a server."""

    name: str
    key: str
    """The setting that names it, for messages."""
    place: str
    """Its folder, hub id or URL."""
    model: Teacher | LiveTeacher | None = None
    tokenizer: Any | None = None
    server: TeacherClient | None = None
    head: ServedHead | None = None
    """What reads the server's states, where the method needs its whole distribution."""
    mover: Mover | None = None
    """Brings the model to its device; None: it is there."""

    def present(self) -> None:
        """Have the model on its device, for what is no forward of it."""
        if self.mover is not None and isinstance(self.model, Teacher):
            self.mover.bring(self.model)

    @property
    def vocab_size(self) -> int | None:
        """Number of columns of its head; None: its server does not say, and no head was read."""
        if self.head is not None:
            return len(self.head.weight)
        source = self.model or self.server
        return None if source is None else source.vocab_size

    @property
    def window(self) -> int | None:
        """Largest number of tokens that it reads; None: it is not known, or there is none."""
        if self.model is not None:
            return window(self.model.model.config)
        return None if self.server is None else self.server.info.window


@dataclass(frozen=True, slots=True)
class Loaded:
    """Holds the models, tokenizers and problems of a run, which the preflight checks."""

    tokenizer: Any
    policy: Policy
    teachers: tuple[LoadedTeacher, ...]
    """By number; the first is the default one."""
    examples: list[Example]
    """The problems to learn from, without those whose prompts are too long."""
    prompts: PromptFacts
    held_out: list[ProblemSet]
    """The sets of the evaluation during training; the first one is that of eval.data. Empty where
    it is off."""

    @property
    def teacher_models(self) -> dict[int, Teacher | LiveTeacher]:
        """Number -> a teacher in this process."""
        numbered = enumerate(self.teachers)
        return {number: one.model for number, one in numbered if one.model is not None}

    @property
    def all_examples(self) -> list[Example]:
        """The problems to learn from, and the held-out ones."""
        return [*self.examples, *(e for one in self.held_out for e in one.examples)]

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """Name of a section of the settings -> which problems it holds, for checkpoints."""
        held_out = {one.section: one.facts.identity for one in self.held_out}
        return {"data": self.prompts.identity} | held_out

    def close(self) -> None:
        """Close the connections to the teachers' servers."""
        for teacher in self.teachers:
            if teacher.server is not None:
                teacher.server.close()


def require_same_settings(config: TrainConfig, world: World) -> None:
    """Raise ValueError on all ranks unless they have the same settings.

    A rank that does what another leaves out, as a check of its head, would wait for it.
    """
    first, *others = world.share(lambda: to_dict(config))
    for rank, settings in enumerate(others, start=1):
        for key, (first_value, value) in differences(first, settings).items():
            raise ValueError(
                f"{key} must be the same on all ranks, got {first_value} on rank 0 and {value} on "
                f"rank {rank}: start all of them with the same file and options"
            )


def require_names(config: TrainConfig) -> None:
    """Raise ValueError where a setting that must name something is empty, before it is shown."""
    model, distils = config.model, config.method.kd is not None
    places = model.teacher_places.items() if distils else ()
    named = {"model.policy": model.policy} | {model.teacher_key(name): one for name, one in places}
    empty = [key for key, place in named.items() if not place.strip()]
    if empty:
        raise ValueError(f"{empty[0]} must name a folder or hub id, got nothing: set {empty[0]}")
    if not config.data.path.strip():
        raise ValueError(
            "data.path must name a file, a folder or a hub id, got nothing: set data.path"
        )


def load(config: TrainConfig, world: World = ALONE, policy_class: type[Policy] = Policy) -> Loaded:
    """Load the models, tokenizers and problems of a run; all ranks call this together.

    policy_class: Policy, or a subclass with another loss.

    Raises: ValueError or OSError for what cannot be loaded; with several ranks a model or problems
        that cannot be loaded raise RankError; ValueError for ranks with different settings.
    """
    require_same_settings(config, world)
    require_names(config)
    if config.model.move_teachers and world.launched:
        raise ValueError(
            "model.move_teachers must be false under torchrun, got true: FSDP2 shards each "
            "teacher; set model.offload_teacher to keep the shards in CPU memory"
        )
    require_reference(config)
    require_optimizer(config.optim, world)
    try_loss(config.method)  # before a model, which takes longer
    trusted = config.model.trust_remote_code
    world.on_main(lambda: require_loadable(config.model.policy, "model.policy", trusted))
    world.on_main(lambda: require_adaptable(config, world))
    output.begin(f"loading problems, {config.data.path}")
    tokenizer = load_tokenizer(config.model.policy, "model.policy", trusted)
    data = config.data
    if config.method.kd is None:  # nobody reads what the template says
        data = replace(data, teacher_template=None)
    examples, prompts = read_problems(data, tokenizer, world)
    if config.method.kd is not None:
        require_teachers(examples, config)
    held_out = read_sets(config.eval.sections, tokenizer, world, config.eval.max_problems)
    teachers = load_teachers(config, world)
    sizes = [teacher.vocab_size for teacher in teachers if teacher.vocab_size is not None]
    output.begin(f"loading the policy, {described(config.model.policy)}", at_once=True)
    policy = load_policy(config, min(sizes, default=None), world, policy_class)
    if has_no_copy(config.model):
        itself = (LiveTeacher if config.model.self_teacher == "live" else BaseTeacher)(policy)
        teachers = tuple(
            replace(teacher, model=itself, mover=None) if teacher.place == SELF else teacher
            for teacher in teachers
        )
    for teacher in teachers if config.model.reference is not None else ():
        require_no_cap(teacher)
    return Loaded(
        tokenizer=tokenizer,
        policy=policy,
        teachers=teachers,
        examples=examples,
        prompts=prompts,
        held_out=held_out,
    )


def load_teachers(config: TrainConfig, world: World = ALONE) -> tuple[LoadedTeacher, ...]:
    """Load the teachers, or connect to them; none where the method does not distil."""
    if config.method.kd is None:
        return ()
    mover = Mover(use_device(config.model)) if config.model.move_teachers else None
    if not config.model.teacher_places:
        load_teacher(config, world)  # says what is missing
    names = list(config.model.teacher_places)
    with ExitStack() as opened:
        teachers = []
        for name in names:
            teachers.append(load_one(config, world, name, mover))
            if (server := teachers[-1].server) is not None:
                opened.callback(server.close)
        opened.pop_all()
    return tuple(teachers)


def require_reference(config: TrainConfig) -> None:
    """Raise ValueError for settings of model.reference and method.extrapolation that do not fit."""
    model, method = config.model, config.method
    if (method.extrapolation == 1) != (model.reference is None):
        raise ValueError(
            "model.reference must be set with a method.extrapolation other than 1, and not without "
            f"one, got {model.reference} and {method.extrapolation:g}: set both, or none of them"
        )
    if model.reference is None:
        return
    places = list(model.teacher_places.values())
    rules = {
        "method.kd": (method.kd is None, method.kd, "a kind of distillation"),
        "model.teacher": (model.teacher_is_self, model.teacher, "another model than self"),
        "model.teachers and model.reference": (
            any(map(is_url, places)),
            ", ".join(places),
            "in this process, since a server gives no head",
        ),
        "model.tensor_parallel": (model.tensor_parallel > 1, model.tensor_parallel, "1"),
        "model.move_teachers": (model.move_teachers, model.move_teachers, "false"),
        "data.teacher_template": (
            config.data.teacher_template is not None,
            config.data.teacher_template,
            "None, since the reference reads what the teacher reads",
        ),
        "model.weights": (
            model.reference == SELF and model.weights is not None and model.lora.rank > 0,
            model.weights,
            "None with adapters and the reference self",
        ),
    }
    for key, (wrong, value, must) in rules.items():
        if wrong:
            raise ValueError(f"{key} must be {must}, with model.reference, got {value}")


def require_no_cap(teacher: LoadedTeacher) -> None:
    """Raise ValueError for logits with a soft cap: no sum of them is that of one head."""
    if teacher.model is not None and teacher.model.softcap is not None:
        raise ValueError(
            f"{teacher.key} must have no soft cap with model.reference, got "
            f"{teacher.model.softcap:g}: set method.extrapolation to 1"
        )


def load_one(config: TrainConfig, world: World, name: str, mover: Mover | None) -> LoadedTeacher:
    """Load one teacher, or connect to it.

    mover: keeps it in CPU memory until it reads; None: it stays where it is.
    """
    key, place = config.model.teacher_key(name), config.model.teacher_places[name]
    if is_url(place):
        output.begin(f"connecting to the teacher, {place}", at_once=True)
        one = config.teacher.of(name)
        server = connect(config.model, one, place, states=config.method.is_exact)
        head = load_served_head(config, server, world, name)
        return LoadedTeacher(name, key, place, server=server, head=head)
    is_self, model = place == SELF, None
    folder = config.model.policy if is_self else place
    if not (is_self and has_no_copy(config.model)):  # which is the policy, loaded later
        output.begin(f"loading the teacher, {described(folder)}", at_once=True)
        model = load_teacher(config, world, name)
    if is_self and model is not None and config.model.weights is not None:
        load_weights(config.model.weights, model, world, config.checkpoint_hashes)
    if mover is not None and model is not None:
        mover.keep(model)
    tokenizer = load_tokenizer(folder, key, config.model.trust_remote_code)
    return LoadedTeacher(name, key, place, model, tokenizer, mover=mover)


def read_sets(
    sections: Mapping[str, DataConfig],
    tokenizer: Any,
    world: World = ALONE,
    max_problems: int | None = None,
) -> list[ProblemSet]:
    """Read a data set of each section, as read_problems does; they are measured without a
    teacher."""
    sets = []
    for section, written in sections.items():
        data = replace(written, teacher_template=None)
        try:
            examples, facts = read_problems(data, tokenizer, world, section, max_problems)
        except FileNotFoundError as error:
            place = "" if section == "data" else f"in {section}: "
            raise FileNotFoundError(f"{place}{error}") from error
        except PromptError:  # names its section
            raise
        except ValueError as error:
            if section == "data":
                raise
            raise ValueError(f"in {section}: {error}") from error
        sets.append(ProblemSet(section, data, examples, facts))
    return sets


def load_served_head(
    config: TrainConfig, server: TeacherClient, world: World, name: str
) -> ServedHead | None:
    """Read the head of a teacher behind a URL, on each rank; None where the method reads none.

    name: the teacher's.

    Raises: ValueError where it cannot be read or is of another model, RankError with several ranks;
        the connection is closed then.
    """
    if not config.method.is_exact:
        return None
    heads: list[ServedHead] = []
    place = str(config.teacher.of(name).head)

    def read() -> None:
        heads.append(
            load_head(
                config.teacher.head_key(name),
                place,
                server.info,
                temperature=config.sampling.temperature,
                dtype=getattr(torch, config.model.dtype),
                device=use_device(config.model),
                trusted=config.model.trust_remote_code,
            )
        )

    output.begin(f"loading the teacher's head, {place}", at_once=True)
    try:
        world.share(read)
    except Exception:
        server.close()
        raise
    return heads[0]


def read_problems(
    data: DataConfig,
    tokenizer: Any,
    world: World = ALONE,
    section: str = "data",
    max_problems: int | None = None,
) -> tuple[list[Example], PromptFacts]:
    """Read a data set, and leave out the problems whose prompts, the policy's or the teacher's, are
    too long.

    Args:
        world: the ranks that call this together; rank 0 alone encodes the prompts.
        section: where `data` stands in the settings, for messages.
        max_problems: how many to read; None: all.
    Raises: ValueError or OSError as load_examples and encode_all do.
    """
    examples = load_examples(data)[:max_problems]

    def encode() -> PromptFacts:
        try:
            return encode_all(tokenizer, examples, data)
        except PromptError as error:
            place = "" if section == "data" else f"in {section}: "
            raise PromptError(f"{place}{error}") from error

    if data.teacher_template is None:
        facts = world.on_main(encode)
        return facts.kept(examples), facts
    teacher = world.on_main(lambda: encode_teacher_prompts(tokenizer, examples, data))
    examples = teacher.kept(examples)
    facts = replace(world.on_main(encode), teacher=teacher)
    return facts.kept(examples), facts


def described(name: str | None) -> str:
    """Name a model, with the size of its weights where they are in a folder."""
    files = [file for kind in ("*.safetensors", "*.bin") for file in Path(str(name)).glob(kind)]
    size = sum(file.stat().st_size for file in files)
    text = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    return f"{name} ({text})" if files else str(name)
