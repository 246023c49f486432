"""Makes a teacher of what KdrlTrainer takes: a model, its folder or id, or the URL of a server.

B completions of a batch, C positions, V columns of the student's head.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path

from kdrl_kernels.integrations.own_logits import require_own_logits
from kdrl_kernels.integrations.trl.config import KdrlConfig
from kdrl_kernels.integrations.trl.head import bare, model_head
from kdrl_train.batch import Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.copies import to_device
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.load import load_tokenizer
from kdrl_train.model.teacher.client import TeacherError, TeacherInfo, differing_token
from kdrl_train.model.teacher.identity import check_same_teacher, keep_teacher
from kdrl_train.model.teacher.openai import connect
from kdrl_train.model.teacher.remote import RemoteTeacher
from kdrl_train.start.teacher_server import check_same_tokens, check_server

logger = logging.get_logger(__name__)

SAMPLED = ("k2", "k3", "k3_ratio")
"""Kinds of distillation that read the teacher's log-probability of the sampled token alone."""

TRL_KEYS = {
    "`check` with model.teacher set to the folder": "teacher_model set to the folder",
    "model.teacher_api": "teacher_api",
    "model.teacher": "teacher_model",
    "with --resume": "with resume_from_checkpoint",
    "--out": "output_dir",
    "sampling.temperature": "temperature",
    "method.kd_eos": "kd_eos",
}
"""What a message of the trainer names -> what it is called here; the longest first."""


@dataclass(frozen=True, slots=True)
class Pupil:
    """What a teacher must fit: the student and its tokenizer."""

    model: Any
    tokenizer: Any
    eos_ids: Sequence[int]
    """Ids that end a completion."""

    @property
    def columns(self) -> int:
        """Number of columns of the student's head."""
        return columns_of(self.model)


def columns_of(model: Any) -> int:
    """Return the number of columns of a model's LM head."""
    return int(model.config.get_text_config().vocab_size)


def is_url(teacher: Any) -> bool:
    """Say whether a teacher is the address of a server."""
    return isinstance(teacher, str) and teacher.startswith(("http://", "https://"))


def check_teacher_model(teacher: Any, args: KdrlConfig, model: Any) -> None:
    """Refuse, before any model is loaded, a teacher that cannot be right.

    Args:
        teacher: as KdrlTrainer takes it.
        model: the student, as KdrlTrainer takes it.
    Raises: ValueError or TypeError, one line.
    """
    if teacher is None and args.kd is not None:
        raise ValueError(
            f"teacher_model must be set with kd={args.kd!r}, got None: pass a model, its folder or "
            "id, or the URL of a teacher's server; or KdrlConfig(kd=None)"
        )
    if teacher is not None and args.kd is None:
        raise ValueError("teacher_model must be None with kd=None, got one: it would do nothing")
    if teacher is None:
        return
    if not isinstance(teacher, str | Path | nn.Module):
        raise TypeError(
            "teacher_model must be a model of transformers, its folder or id, or a URL, got "
            f"{type(teacher).__name__}"
        )
    if isinstance(teacher, str) and re.match(r"[\w.-]+:\d+/?$", teacher):
        raise ValueError(f"teacher_model must be http://host:port for a server, got {teacher!r}")
    if isinstance(teacher, nn.Module) and isinstance(model, nn.Module):
        check_apart(teacher, model)
    if args.teacher_model_init_kwargs is not None and (
        is_url(teacher) or isinstance(teacher, nn.Module)
    ):
        raise ValueError(
            "teacher_model_init_kwargs must be None for a teacher that is a model or a URL, got "
            f"{args.teacher_model_init_kwargs}: they are for one that is loaded here"
        )
    if is_url(teacher) and (args.kd not in SAMPLED or args.kd_baseline is not None):
        raise ValueError(
            f"kd must be one of {SAMPLED} and kd_baseline None for a teacher behind a URL, got "
            f"{args.kd!r} and {args.kd_baseline!r}: a server scores sampled tokens only; or load "
            "the teacher here (teacher_model: its folder or id)"
        )
    if not is_url(teacher) and args.teacher_api != "kdrl":
        raise ValueError(
            f"teacher_api must be 'kdrl' for a teacher in this process, got {args.teacher_api!r}"
        )


def local_teacher(teacher: Any, args: KdrlConfig, pupil: Pupil) -> Any:
    """Return a teacher that computes in this process: frozen, evaluating, not wrapped yet.

    Args:
        teacher: a model, or its folder or id, which is loaded in the student's dtype unless
            args.teacher_model_init_kwargs say otherwise.
    Raises: ValueError, one line, where it does not fit the student.
    """
    if isinstance(teacher, nn.Module):
        check_apart(teacher, pupil.model)
        model, name = teacher, str(getattr(teacher, "name_or_path", "") or "")
        tokenizer = tokenizer_of(name, args) if name else None
    else:
        name = str(teacher)
        tokenizer = load_tokenizer(name, "teacher_model", args.trust_remote_code)
        model = create_model_from_path(name, **_load_options(args, pupil.model))
    check_causal(model)
    check_vocabulary(model, tokenizer, args, pupil)
    model.requires_grad_(requires_grad=False)
    return model.eval()


def check_causal(model: Any) -> None:
    """Raise ValueError for a teacher without an LM head, or with an adapter on it."""
    inner = bare(model)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ValueError(
            "teacher_model must be a causal LM of transformers, got "
            f"{type(inner).__name__}, which has no LM head"
        )
    model_head(inner, 1.0).check_teacher()
    require_own_logits(inner, "teacher_model")


def _load_options(args: KdrlConfig, student: Any) -> dict[str, Any]:
    """Return the options of from_pretrained, with the defaults that TRL gives a reference model."""
    options: dict[str, Any] = {**(args.teacher_model_init_kwargs or {})}  # type: ignore[dict-item]
    if args.distributed_state is not None and args.distributed_state.distributed_type != "NO":
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    options.setdefault("dtype", options.pop("torch_dtype", student.dtype))  # the older name
    return options


def tokenizer_of(name: str, args: Any) -> Any:
    """Load the tokenizer of a model that came as an object; None where there is none."""
    try:
        return load_tokenizer(name, "teacher_model", args.trust_remote_code)
    except ValueError as error:
        logger.warning("the teacher's tokenizer cannot be compared with the student's: %s", error)
        return None


def check_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ValueError where training the student would move the teacher."""
    trained = {id(weight) for weight in student.parameters()}
    if any(id(weight) in trained for weight in teacher.parameters()):
        raise ValueError(
            "teacher_model must not share weights with model, got some that are in both: the "
            "teacher would move with the student; load it a second time"
        )


def check_vocabulary(model: Any, tokenizer: Any, args: KdrlConfig, pupil: Pupil) -> None:
    """Compare a teacher's tokens, its columns and its ends of sequence with the student's.

    tokenizer: the teacher's; None: not known.

    Raises: ValueError, one line, where they differ.
    """
    if tokenizer is not None:
        check_tokens(tokenizer, pupil.tokenizer)
    check_columns(columns_of(model), pupil)
    try:
        ends = eos_ids(model, tokenizer)
    except ValueError:  # it names no end of a sequence, so it teaches none
        return
    check_ends(ends, args, pupil)


def check_tokens(tokenizer: Any, of_student: Any) -> None:
    """Raise ValueError where an id is another token for a teacher's tokenizer."""
    different = differing_token(of_student, tokenizer)
    if different is not None:
        i, one, other = different
        raise ValueError(
            f"teacher_model must have the student's tokenizer, got another: token {i} is {one!r} "
            f"for the student and {other!r} for the teacher; choose two models of one family"
        )


def check_columns(columns: int | None, pupil: Pupil) -> None:
    """Raise ValueError where a teacher's head has no column for a token of the student's head.

    A tokenizer may have tokens for which the student's own head has no column (Gemma 3 1B's for
    images): it never samples these.
    """
    ids = pupil.tokenizer.get_vocab().values()
    highest = max(i for i in ids if i < pupil.columns)
    if columns is not None and highest >= columns:
        raise ValueError(
            f"teacher_model must have a column for every token, got {columns:,} columns and a "
            f"token with id {highest:,}: choose a teacher of the student's family"
        )


def check_ends(ends: Sequence[int] | None, args: KdrlConfig, pupil: Pupil) -> None:
    """Raise ValueError where a teacher would teach an end at which no completion ends.

    ends: the teacher's end-of-sequence tokens; None: not known.
    """
    extra = sorted(set(ends or []) - set(pupil.eos_ids))
    if extra and args.kd_eos == "keep":
        raise ValueError(
            f"teacher_model must end sequences as the student does, got {extra} "
            f"({pupil.tokenizer.convert_ids_to_tokens(extra)}) beside the student's "
            f"{sorted(pupil.eos_ids)}: put them into eos_token_id of the student's "
            "generation_config, or set kd_eos='mask'"
        )


def wrapped(model: Any, trainer: Any) -> Any:
    """Wrap a teacher as TRL wraps its reference model: DeepSpeed, FSDP or none."""
    if model is trainer.ref_model:
        return model
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


class TeacherServer:
    """Gets a teacher's log-probabilities of completions from a server.

    Each process queries it for its own completions, and waits while the server is away, as
    `python -m kdrl_train` does. Every reply must come from the same model.

    Args:
        url: http://host:port; the token that the server demands is in KDRL_TEACHER_TOKEN.
    Raises: ValueError or TeacherError, one line, where the server does not reply, or its model
        does not fit the student.
    """

    def __init__(self, url: str, args: KdrlConfig, pupil: Pupil) -> None:
        try:
            values = {
                "model": {"teacher": url, "teacher_api": args.teacher_api},
                "sampling": {"temperature": args.temperature},
            }
            config = TrainConfig(**values)  # type: ignore[arg-type]  # keys in their messages
            client = connect(config.model, config.teacher)
        except (ValueError, TeacherError) as error:
            raise _renamed(error) from None
        try:
            self._check(client, args, pupil)
        except (ValueError, TeacherError) as error:
            client.close()
            raise _renamed(error) from None
        columns = None
        if client.vocab_size is not None and client.vocab_size != pupil.columns:
            columns = min(client.vocab_size, pupil.columns)
        self.info: TeacherInfo = client.info
        self._remote = RemoteTeacher(client, config, columns, logger.warning)

    def _check(self, client: Any, args: KdrlConfig, pupil: Pupil) -> None:
        """Compare the server's model with the student; warn where others can read the queries."""
        try:
            check_server(client)
        except UserWarning as doubt:
            logger.warning("%s", _renamed(doubt))
        check_same_tokens(client, pupil.tokenizer)
        check_columns(client.vocab_size, pupil)
        check_ends(client.info.eos_ids, args, pupil)

    def logprobs(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return log q of each token of the completions, [B, C] float32, nats.

        Args:
            inputs: prompt_ids, prompt_mask, completion_ids and completion_mask as TRL pads them;
                completions with kd_weight 0, where it is set, are not sent.
        Returns: 0 in padding, and in completions that were not sent.
        Raises: TeacherError where the server's reply is wrong, or no reply comes in time.
        """
        tokens, mask = inputs["completion_ids"], inputs["completion_mask"].bool().cpu()
        sent = mask.any(dim=1)
        if "kd_weight" in inputs:
            sent &= (inputs["kd_weight"] > 0).cpu()
        rollouts = Rollouts(
            prompt_ids=_unpadded(inputs["prompt_ids"], inputs["prompt_mask"].bool()),
            completion_ids=_unpadded(tokens, mask),
            logprobs=[],
            truncated=torch.zeros(len(tokens), dtype=torch.bool),
            texts=[],
        )
        try:
            replies = self._remote.collect(rollouts, sent, {})
        except TeacherError as error:
            raise _renamed(error) from None
        logprobs = torch.zeros(tokens.shape, dtype=torch.float32)
        for r, reply in enumerate(replies):
            if isinstance(reply, Tensor):
                logprobs[r, mask[r]] = reply
        return to_device(logprobs, tokens.device)

    def save(self, checkpoint: Path) -> None:
        """Write into a checkpoint's folder which teacher the run has."""
        keep_teacher(checkpoint, self.info)

    def check_same(self, checkpoint: Path) -> None:
        """Compare the teacher with that of a checkpoint.

        Raises: TeacherError for another one, after closing the connections.
        """
        try:
            for doubt in check_same_teacher(checkpoint, self.info):
                logger.warning("%s", doubt)
        except TeacherError as error:
            self.close()
            raise _renamed(error) from None

    def close(self) -> None:
        """Close the connections. May be called twice."""
        self._remote.close()


def _unpadded(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the ids of each row that its mask holds, on the CPU."""
    return [row[kept] for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def _renamed(error: Any) -> Any:
    """Return an error or warning whose message names what it is about as TRL does."""
    text = str(error)
    for key, name in TRL_KEYS.items():
        text = text.replace(key, name)
    return type(error)(text)
