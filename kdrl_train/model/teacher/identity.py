"""Keeps in a run folder's teacher.json which teacher the run learns from; of several teachers each
has a file, teacher_NAME.json."""

import json
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from kdrl_train.config.models import DEFAULT_TEACHER, teacher_file
from kdrl_train.errors import require_file, written
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.fingerprint import weights_hash
from kdrl_train.model.policy import Teacher
from kdrl_train.model.self_teacher import LiveTeacher
from kdrl_train.model.teacher.client import TeacherError, TeacherInfo, vocabulary_hash
from kdrl_train.model.teacher.head import logit_numbers
from kdrl_train.model.window import window

SAME_NATS = 0.05
"""Largest mean difference of log-probabilities that may be rounding alone, that of bfloat16."""
MOVED_NATS = 1e-3
"""The same of a model under another name: a neighbouring checkpoint differs by more."""
RESTORE = "restore it, or delete it if you are sure that the run has the teacher that it had"
FILE = teacher_file()
"""That of the default teacher."""


def describe(
    name: str, model: Teacher | LiveTeacher, tokenizer: Any, *, hashed: bool = True
) -> TeacherInfo:
    """Describe a teacher in this process.

    name: its folder or hub id, whose files are hashed if `hashed`, else its weights are in no file.
    """
    scale, softcap = logit_numbers(model.model.config.get_text_config())
    return TeacherInfo(
        model=name,
        window=window(model.model.config),
        vocab_size=model.vocab_size,
        dtype=str(model.compute_dtype).removeprefix("torch."),
        tokenizer=vocabulary_hash(tokenizer),
        eos_ids=eos_ids(model.model, tokenizer),
        weights=weights_hash(name) if hashed else None,
        hidden_size=model.model.get_output_embeddings().weight.shape[1],
        logit_scale=scale,
        softcap=softcap,
    )


def check_same_teacher(folder: Path, now: TeacherInfo, name: str = DEFAULT_TEACHER) -> list[str]:
    """Compare a teacher with that of a run so far, of the same name; write nothing.

    A resumed run must learn from the same model, in whatever folder or at whatever URL. Without
    hashes of the weights it may have another name if the files that the server names are equal, or
    its log-probabilities of a few prompts nearly are.

    Returns: what to warn of: weights that cannot be compared.
    Raises: TeacherError where it is another one, and for a file that is damaged.
    """
    path = folder / teacher_file(name)
    if not path.exists():
        return [
            f"{folder} does not say which teacher the run had, as an older version began it: make "
            f"sure that it was {now.model}"
        ]
    require_file(path)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        before = TeacherInfo(**stored)
    except (ValueError, TypeError) as error:
        raise TeacherError(f"{path} must describe a teacher, got {error}: {RESTORE}") from error
    hashed = before.weights is not None and now.weights is not None
    apart = None if hashed else _apart(before, now)
    copied = before.files is not None and before.files == now.files
    moved = (before.model, before.root) != (now.model, now.root)
    known = hashed or copied or (apart is not None and apart <= MOVED_NATS)
    ignored = {"fingerprint", "probe_ids", "probe_logprobs"}
    ignored |= {"model", "root"} if known else set()
    hashes = {"weights": (before.weights, now.weights), "files": (before.files, now.files)}
    ignored |= {key for key, pair in hashes.items() if None in pair}
    changed = [
        f"{key}: {getattr(before, key)} in the file, {value} now"
        for key, value in asdict(now).items()
        if key in stored  # a file of an older version says less
        and key not in ignored
        and getattr(before, key) != value
    ]
    if apart is not None and not apart <= (MOVED_NATS if moved and not known else SAME_NATS):
        changed.append(f"its log-probabilities of a few prompts, by {apart:.2g} nats on average")
    if changed:
        raise TeacherError(
            f"the teacher {now.model} must be that of {path}, got another one "
            f"({'; '.join(changed)}): name or serve that model, or start a new run with another "
            "--out"
        )
    if hashed or (copied and apart is not None):
        return []
    doubt = f"the weights of {now.model} cannot be compared with those of {path}"
    if moved:
        doubt += f"; it was {_place(before)} then, and is {_place(now)} now"
    if apart is not None:
        doubt += f"; its log-probabilities of a few prompts differ by {apart:.1g} nats on average"
    return [doubt]


def _place(info: TeacherInfo) -> str:
    """Say the name of a teacher, and what its server has loaded if that is known."""
    return info.model if info.root in (None, info.model) else f"{info.model} from {info.root}"


def _apart(before: TeacherInfo, now: TeacherInfo) -> float | None:
    """Return the mean difference of what two teachers say of a few prompts, in nats; None where it
    is not known, or they are other prompts."""
    if before.probe_ids is None or before.probe_ids != now.probe_ids:
        return None
    pairs = zip(*(chain(*one.probe_logprobs or ()) for one in (before, now)), strict=False)
    differences = [abs(x - y) for x, y in pairs]
    return fmean(differences) if differences else None


def keep_teacher(folder: Path, info: TeacherInfo, name: str = DEFAULT_TEACHER) -> None:
    """Write which teacher a run has, where it is not written yet, or was without its hashes."""
    path, now = folder / teacher_file(name), asdict(info)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        new = [key for key in ("weights", "files") if now[key] and not before.get(key)]
        if not new:
            return
        if "weights" not in new:  # the first log-probabilities stay, to be compared with
            now = before | {"files": info.files}
    work = path.with_name(f".{path.name}.tmp")
    with written(path):
        work.unlink(missing_ok=True)  # a link would be followed
        work.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        work.replace(path)
