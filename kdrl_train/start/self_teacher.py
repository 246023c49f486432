"""Checks before the first step what the policy reads as its own teacher, and says which it is."""

import hashlib
import json
from dataclasses import replace

from kdrl_train.config import TrainConfig
from kdrl_train.config.models import SELF
from kdrl_train.model.teacher.client import TeacherInfo
from kdrl_train.model.teacher.identity import describe
from kdrl_train.rollouts.problems import encode_prompt
from kdrl_train.rollouts.teacher_prompts import encode_teacher_prompt
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.best import resolved
from kdrl_train.start.load import Loaded, LoadedTeacher
from kdrl_train.start.prompts import PROBE_PROMPTS, first_prompt, shown


def describe_self(config: TrainConfig, teacher: LoadedTeacher) -> TeacherInfo:
    """Describe weights of the policy as a teacher: those of step 0 by the hash of their files.

    Weights that change during the run have no hash: the run's settings say which they are, and its
    checkpoints hold them.
    """
    kind, weights = config.model.self_teacher, config.model.weights
    assert teacher.model is not None
    frozen = kind == "frozen"
    info = describe(config.model.policy, teacher.model, teacher.tokenizer, hashed=frozen)
    info = replace(info, model=f"{SELF}, {kind}")
    if weights is None or info.weights is None:
        return info
    saved = checkpoint.read(resolved(weights))  # best.json may name another one later
    both = json.dumps([info.weights, saved.step, saved.hashes], sort_keys=True)
    return replace(info, weights=hashlib.sha256(both.encode()).hexdigest())


def first_prompts(config: TrainConfig, loaded: Loaded) -> list[str]:
    """Say what the policy reads first, and the teacher, if that is another prompt."""
    tokenizer, example, data = loaded.tokenizer, loaded.examples[0], config.data
    prompt = first_prompt(tokenizer, example, data)
    said = [f"the first prompt, with its special tokens: {prompt}"]
    if loaded.prompts.teacher is not None:
        ids = encode_teacher_prompt(tokenizer, example, data)
        said.append(f"the teacher's first prompt: {shown(tokenizer.decode(ids))}")
    return said


def check_teacher_prompt(config: TrainConfig, loaded: Loaded) -> str:
    """Show the teacher's first prompt with its special tokens.

    Raises: ValueError where the weights that are trained read the same as the policy; UserWarning
        where another teacher does, and where problems are left out.
    """
    tokenizer, data = loaded.tokenizer, config.data
    examples = loaded.examples[:PROBE_PROMPTS]
    ids = [encode_teacher_prompt(tokenizer, example, data) for example in examples]
    detail = shown(tokenizer.decode(ids[0]))
    same = all(
        one == encode_prompt(tokenizer, example, data)
        for one, example in zip(ids, examples, strict=True)
    )
    if same and config.model.self_teacher == "live":
        raise ValueError(
            'data.teacher_template must show a teacher "self" that is "live" more than the policy '
            f"reads, got the same prompt, {detail}: the gradient would be 0"
        )
    facts = loaded.prompts.teacher
    doubts = ["the teacher reads what the policy reads"] if same else []
    if facts is not None:
        doubts += [facts.left_out] if facts.left_out else []
        detail += f", {facts.longest} tokens at most"
    if doubts:
        raise UserWarning("; ".join([*doubts, detail]))
    return detail
