"""Checks of the prompts before the first step: how they are written, their lengths, their ends."""

from typing import Any

from kdrl_train.config import TrainConfig
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.policy import HeadedModel
from kdrl_train.rollouts.problems import encode_prompt
from kdrl_train.start.load import Loaded


def check_prompts(config: TrainConfig, loaded: Loaded) -> str:
    """Check that no prompt is longer than max_prompt_tokens, and that each fits a model's window
    together with its completion: training prompts both models', held-out ones the policy's.

    Raises: ValueError for a prompt that is too long, or a window that is too short.
    """
    lengths = [len(encode_prompt(loaded.tokenizer, e, config.data)) for e in loaded.examples]
    try:
        held_out = [
            len(encode_prompt(loaded.tokenizer, e, config.eval.data)) for e in loaded.held_out
        ]
    except ValueError as error:
        raise ValueError(f"in eval.data: {error}") from error
    needed = max(lengths) + config.sampling.max_new_tokens
    _check_window("model.policy", _window(loaded.policy), max(lengths + held_out), config)
    if loaded.teacher is not None:
        _check_window("model.teacher", _window(loaded.teacher), max(lengths), config)
    if loaded.server is not None:
        _check_window("model.teacher", loaded.server.info.window, max(lengths), config)
    extra = f"{len(held_out):,} held out of at most {max(held_out)}, " if held_out else ""
    template = config.data.chat_template and loaded.tokenizer.chat_template is not None
    return (
        f"{len(lengths):,} problems, {min(lengths)} to {max(lengths)} tokens, {extra}"
        f"{'with the chat template' if template else 'without a chat template'}; at most {needed} "
        "tokens with the completion"
    )


def _window(model: HeadedModel) -> int | None:
    """Return the number of positions of a model; None if its configuration names none."""
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", None)


def _check_window(name: str, window: int | None, longest: int, config: TrainConfig) -> None:
    """Raise ValueError if the longest prompt and a completion do not fit a model's window."""
    if window is not None and longest + config.sampling.max_new_tokens > window:
        raise ValueError(
            f"{name} must hold the longest prompt and completion, got a window of {window} "
            f"tokens for {longest} + {config.sampling.max_new_tokens}: lower "
            "sampling.max_new_tokens or choose another model"
        )


def check_eos(loaded: Loaded, kd_eos: str = "keep") -> str:
    """Check that tokenizer, policy and teacher end a sequence with the same tokens.

    Args:
        kd_eos: "mask" lets the teacher end with other tokens: then no end is distilled.
    Raises: ValueError if the policy does not know the tokenizer's end-of-sequence token, so that
        completions would run on, or one of the teacher's, so that the teacher would teach an end
        at which sampling does not stop.
    """
    model, tokenizer = loaded.policy.model, loaded.tokenizer
    ids = eos_ids(model, tokenizer)
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    eos_id = tokenizer.eos_token_id
    if declared and eos_id is not None and eos_id not in declared:
        raise ValueError(
            f"the policy's end-of-sequence tokens must agree, got {eos_id} "
            f"({tokenizer.eos_token!r}) from its tokenizer and {declared} from its "
            "generation_config.json: put both into eos_token_id of generation_config.json"
        )
    note = ""
    teacher_ids = [] if loaded.server is None else loaded.server.info.eos_ids
    if loaded.teacher is not None:
        teacher_ids = eos_ids(loaded.teacher.model, loaded.teacher_tokenizer)
    extra = sorted(set(teacher_ids or []) - set(ids))
    if extra and kd_eos == "keep":
        raise ValueError(
            f"the teacher must end sequences as the policy does, got {extra} "
            f"({tokenizer.convert_ids_to_tokens(extra)}) beside the policy's {ids}: put them "
            "into eos_token_id of the policy's generation_config.json, or set method.kd_eos to mask"
        )
    if extra:
        note = f"; the teacher also ends with {extra}, so ends are not distilled"
    if teacher_ids is None:
        note = "; the teacher's are not known: its server does not say"
    return f"{ids} {tokenizer.convert_ids_to_tokens(ids)}{note}"


def check_tokenizers(policy: Any, teacher: Any) -> str:
    """Check that the two vocabularies are the same map from token to id.

    Raises: ValueError naming the token with the lowest id that differs.
    """
    policy_tokens = {i: token for token, i in policy.get_vocab().items()}
    teacher_tokens = {i: token for token, i in teacher.get_vocab().items()}
    for i in sorted(policy_tokens.keys() | teacher_tokens.keys()):
        if policy_tokens.get(i) != teacher_tokens.get(i):
            raise ValueError(
                f"model.teacher must have the policy's tokenizer, got another: token {i} is "
                f"{policy_tokens.get(i)!r} for the policy and {teacher_tokens.get(i)!r} for the "
                "teacher; choose two models of one family, or do without a teacher: --preset grpo"
            )
    return f"the same {len(policy_tokens):,} tokens"
