"""Checks of the prompts before the first step: how they are written, their lengths, their ends."""

import copy
import re
from dataclasses import replace
from typing import Any

from kdrl_train.batch import Example
from kdrl_train.config import DataConfig, TrainConfig
from kdrl_train.model.eos import eos_ids, ordinary_ends, turn_end
from kdrl_train.model.teacher.client import UNKNOWN, TeacherClient, differing_token
from kdrl_train.model.window import window
from kdrl_train.rollouts.problems import ProblemSet, PromptFacts, encode_prompt
from kdrl_train.rollouts.rendering import (
    PromptError,
    chat_text,
    encode_text,
    is_special,
    messages_from,
    plain_parts,
    templated,
)
from kdrl_train.start.duplicates import learnt_as_well, repeated
from kdrl_train.start.load import Loaded, LoadedTeacher
from kdrl_train.start.taught import taught_otherwise, written_otherwise
from kdrl_train.start.teacher_server import check_same_tokens


def check_prompts(config: TrainConfig, loaded: Loaded) -> str:
    """Check that each prompt fits a model's window together with its completion: training prompts
    both models', held-out ones the policy's.

    Raises: ValueError for a window that is too short; UserWarning where problems are left out, or
        have the text of others.
    """
    facts, tokens = loaded.prompts, config.sampling.max_new_tokens
    policy_window = window(loaded.policy.model.config)
    check_window("model.policy", policy_window, facts.longest, tokens)
    held_out_tokens = config.eval.sampling(config.sampling).max_new_tokens
    for one in loaded.held_out:
        check_window("model.policy", policy_window, one.facts.longest, held_out_tokens, one.section)
    for teacher in loaded.teachers:
        if facts.teacher is None:
            check_window(teacher.key, teacher.window, facts.longest, tokens)
        else:
            setting = "data.max_teacher_prompt_tokens"
            check_window(
                teacher.key, teacher.window, facts.teacher.longest, tokens, setting=setting
            )
    extra = "".join(
        f"{one.facts.count:,} held out{_name(one)} of at most {one.facts.longest}, "
        for one in loaded.held_out
    )
    detail = (
        f"{facts.count:,} problems, {facts.shortest} to {facts.longest} tokens, {extra}"
        f"{'with the' if templated(loaded.tokenizer, config.data) else 'without a'} chat template; "
        f"at most {facts.longest + config.sampling.max_new_tokens} tokens with the completion"
    )
    doubts = [facts.left_out] if facts.left_out else []
    left_out = {one.section: one.facts.left_out for one in loaded.held_out}
    doubts += [f"in {section} {text}" for section, text in left_out.items() if text]
    doubts += repeated(loaded.examples)
    for one in loaded.held_out:
        doubts += learnt_as_well(loaded.examples, one.examples, one.section)
    shared = loaded.policy.choice.longest
    if shared is not None and facts.longest + config.sampling.max_new_tokens > shared:
        doubts.append(
            f"model.policy changes its rotary factors beyond {shared:,} tokens: a completion that "
            "becomes longer, or shares a batch with a longer one, is sampled with other factors "
            "than it is trained with, and the run stops (engine.max_sampler_mismatch); lower "
            "data.max_prompt_tokens or sampling.max_new_tokens"
        )
    return _with_doubts(detail, doubts)


def longest_with_completion(config: TrainConfig, loaded: Loaded) -> int:
    """Return the tokens of the longest prompt with its completion, of training and evaluation."""
    held_out = config.eval.sampling(config.sampling).max_new_tokens
    lengths = [one.facts.longest + held_out for one in loaded.held_out]
    return max([loaded.prompts.longest + config.sampling.max_new_tokens, *lengths])


def _name(one: ProblemSet) -> str:
    """Name a set in a sentence, but for that of eval.data."""
    return "" if one.section == "eval.data" else f" in {one.section}"


def check_first_prompt(config: TrainConfig, loaded: Loaded) -> str:
    """Show the first prompt with its special tokens.

    Raises: UserWarning where prompts are written in a way that few runs intend.
    """
    tokenizer, example, data = loaded.tokenizer, loaded.examples[0], config.data
    ends = eos_ids(loaded.policy.model, tokenizer)
    detail = first_prompt(tokenizer, example, data)
    doubts = prompt_doubts(tokenizer, ends, data, example, loaded.prompts)
    doubts += taught_otherwise(config.model.policy, tokenizer, data)
    if not templated(tokenizer, data):
        behind = tokenizer.convert_ids_to_tokens(plain_parts(tokenizer, example.prompt)[2])
        if behind:
            detail += f"; {behind}, which the tokenizer puts behind a text, are left out"
    elif (
        "enable_thinking" in str(tokenizer.chat_template)
        and "enable_thinking" not in data.template_arguments
    ):
        detail += "; the chat template's switch enable_thinking keeps its default"
    if (
        templated(tokenizer, data)
        and "<think>" in chat_text(tokenizer, example.content, data)[-20:]
    ):
        note = "the chat template has written <think>: a completion does not begin with it"
        detail += f"; {note}"
        if not config.reward.builtin:
            functions = (part.function for part in config.reward.parts)
            names = ", ".join(name for name in functions if name not in ("math", "exact"))
            doubts.append(f"{note}, and {names} must not expect it")
    for one in loaded.held_out:
        more = prompt_doubts(tokenizer, ends, one.data, one.examples[0], one.facts)
        doubts += [f"in {one.section}: {doubt}" for doubt in more]
        other = written_otherwise(tokenizer, data, one.data)
        if other:
            doubts.append(
                f"held-out problems are written otherwise: {one.section} and data differ in "
                + ", ".join(other)
            )
    return _with_doubts(detail, doubts)


def first_prompt(tokenizer: Any, example: Example, data: DataConfig) -> str:
    """Write a problem's prompt on one line, as the policy reads it, with its special tokens."""
    return shown(tokenizer.decode(encode_prompt(tokenizer, example, data)))


def prompt_doubts(
    tokenizer: Any, ends: list[int], data: DataConfig, first: Example, facts: PromptFacts
) -> list[str]:
    """Say what is doubtful in the prompts of a data set.

    Args:
        ends: the tokens that end a completion.
        first: its first problem.
    """
    doubts = [*typed_escapes(data), *_doubtful_ends(tokenizer, ends, facts)]
    if templated(tokenizer, data):
        doubts += _lost_text(tokenizer, first, data) + _template_twice(tokenizer, first)
        doubts += _unread_arguments(tokenizer, first, data)
    return doubts


PROBE_PROMPTS = 4
"""How many prompts are compared, and how many the teacher's probe reads."""
_LATEX = "abla|e|eq|eg|u|ot|otin|i|leq|geq|mid|exists|parallel|cong|sim|subseteq|earrow|ewline"
_ESCAPE = re.compile(rf"(?<!\\)\\(?:[nrt](?![a-z])|n(?!(?:{_LATEX})(?![a-z])))")
"""A backslash and n, r or t that begin no command of LaTeX, such as \\nabla or \\times."""


def typed_escapes(data: DataConfig) -> list[str]:
    """Name the settings that hold a backslash and an n, which no shell turns into a line break."""
    return [
        f"data.{name} holds a backslash and {match.group()[1]!r}, which are no line break or "
        "tab: quote it as $'...' in the shell, or in double quotes in YAML"
        for name in ("prompt_template", "system_prompt", "teacher_template")
        if (match := _ESCAPE.search(getattr(data, name) or ""))
    ]


def _doubtful_ends(tokenizer: Any, ends: list[int], facts: PromptFacts) -> list[str]:
    """Say which prompts end with an end of sequence, or start twice."""
    doubts = []
    closing = {token: facts.last[token] for token in ends if facts.last[token]}
    if closing:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(closing))))
        doubts.append(
            f"{sum(closing.values()):,} of {facts.count:,} prompts end with {names}, an end of "
            "sequence, which no completion follows; let the chat template open the assistant's "
            "turn (add_generation_prompt), or take it out of data.prompt_template"
        )
    if facts.started_twice and tokenizer.bos_token_id not in ends:
        doubts.append(
            f"{facts.started_twice:,} of {facts.count:,} prompts hold the start of sequence "
            f"{tokenizer.bos_token!r} more than once: take it out of data.prompt_template or of "
            "the problems"
        )
    return doubts


def _lost_text(tokenizer: Any, example: Example, data: DataConfig) -> list[str]:
    """Name what the chat template leaves out of a prompt."""
    text = chat_text(tokenizer, example.content, data)
    written = [("the problem", one["content"]) for one in messages_from(example.content)]
    written += [("data.system_prompt", data.system_prompt or "")]
    names = dict.fromkeys(name for name, part in written if part.strip() not in text)
    return [
        f"the chat template leaves out or changes {name}: correct chat_template of the tokenizer, "
        "or write all into data.prompt_template and set data.chat_template to false"
        for name in names
    ]


def _unread_arguments(tokenizer: Any, example: Example, data: DataConfig) -> list[str]:
    """Name the arguments without which the chat template renders a prompt alike."""
    text = chat_text(tokenizer, example.content, data)
    doubts = []
    for name, value in data.template_arguments.items():
        rest = {key: other for key, other in data.template_arguments.items() if key != name}
        if chat_text(tokenizer, example.content, replace(data, template_arguments=rest)) == text:
            why = "the chat template does not read it"
            if name in str(tokenizer.chat_template):
                why = "that is its default, or it has no effect on this prompt"
            doubts.append(f"data.template_arguments.{name} = {value!r} changes nothing: {why}")
    return doubts


def _template_twice(tokenizer: Any, example: Example) -> list[str]:
    """Say so where a text holds special tokens already, before the chat template is applied."""
    texts = [one["content"] for one in messages_from(example.content)]
    ids = dict.fromkeys(i for text in texts for i in plain_parts(tokenizer, text)[1])
    tokens = tokenizer.convert_ids_to_tokens([i for i in ids if is_special(tokenizer, i)])
    # not what stands for unknowns
    tokens = [token for token in tokens if any(token in text for text in texts)]
    if not tokens:
        return []
    return [
        f"the text of a problem holds {', '.join(tokens)}, and "
        "the chat template is applied around it: take them out of data.prompt_template or of the "
        "problems, or set data.chat_template to false"
    ]


def shown(text: str, width: int = 600) -> str:
    """Write a text on one line, without its middle where it is longer than `width`."""
    if len(text) > width:
        text = f"{text[: width // 2]} [...] {text[-width // 2 :]}"
    return repr(text)


def _with_doubts(detail: str, doubts: list[str]) -> str:
    """Return the detail of a check; raise it as a UserWarning where there are doubts."""
    if doubts:
        raise UserWarning("; ".join([*doubts, detail]))
    return detail


def check_window(
    name: str,
    tokens: int | None,
    longest: int,
    max_new_tokens: int,
    section: str = "data",
    setting: str | None = None,
) -> None:
    """Raise ValueError if the longest prompt and a completion do not fit a window of `tokens`.

    section: of the settings, where the prompt's data set stands.
    setting: the one that leaves longer prompts out; None: max_prompt_tokens of the section.
    """
    if tokens is not None and longest + max_new_tokens > tokens:
        of_run = section.startswith("eval.")  # and not of the command eval
        completion = "eval.max_new_tokens" if of_run else "sampling.max_new_tokens"
        raise ValueError(
            f"{name} must hold the longest prompt and completion, got a window of {tokens} "
            f"tokens for {longest} + {max_new_tokens}: lower {completion}, or "
            f"{setting or f'{section}.max_prompt_tokens'}, which leaves longer prompts out, or "
            "choose another model"
        )


def check_eos(config: TrainConfig, loaded: Loaded) -> str:
    """Check that tokenizer, policy and teacher end a sequence with the same tokens.

    With method.kd_eos "mask" the teacher may end with other tokens: then no end is distilled.

    Raises: ValueError if the policy does not know the tokenizer's end-of-sequence token, so that
        completions would run on, or one of the teacher's, so that the teacher would teach an end
        at which sampling does not stop; UserWarning if it does not know the one with which the
        chat template ends a turn.
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
    for teacher in loaded.teachers:
        teacher_ids = _teacher_ends(teacher)
        extra = sorted(set(teacher_ids or []) - set(ids))
        if extra and config.method.kd_eos == "keep":
            raise ValueError(
                f"the teacher must end sequences as the policy does, got {extra} "
                f"({tokenizer.convert_ids_to_tokens(extra)}) beside the policy's {ids}, from "
                f"{teacher.key}: put them into eos_token_id of the policy's "
                "generation_config.json, or set method.kd_eos to mask"
            )
        if extra:
            note = f"; the teacher also ends with {extra}, so ends are not distilled"
        if teacher_ids is None:
            note = "; the teacher's are not known: its server does not say"
    detail = f"{ids} {tokenizer.convert_ids_to_tokens(ids)}{note}"
    return _with_doubts(detail, turn_doubts(tokenizer, ids, config.data))


def _teacher_ends(teacher: LoadedTeacher) -> list[int] | None:
    """Return the tokens with which a teacher ends a sequence; None where they are not known."""
    if teacher.model is not None:
        return eos_ids(teacher.model.model, teacher.tokenizer)
    return None if teacher.server is None else teacher.server.info.eos_ids


def turn_doubts(tokenizer: Any, ends: list[int], data: DataConfig) -> list[str]:
    """Say so where an ordinary token ends a completion, and where that with which the chat template
    ends a turn does not."""
    doubts, end = ordinary_ends(tokenizer, ends), None
    if templated(tokenizer, data):
        end = turn_end(tokenizer)
    if end is None or end in ends:
        return doubts
    if isinstance(end, str):
        return [
            *doubts,
            f"the chat template ends the assistant's turn with the text {shown(end, 40)}, which is "
            "no token and ends no completion: correct chat_template of the tokenizer, or set "
            "data.chat_template to false",
        ]
    return [
        *doubts,
        f"the chat template ends the assistant's turn with {end} "
        f"({tokenizer.convert_ids_to_tokens(end)!r}), which does not end a completion: put it "
        "into eos_token_id of the policy's generation_config.json, or set data.chat_template to "
        "false",
    ]


def check_tokenizers(config: TrainConfig, loaded: Loaded, teacher: LoadedTeacher) -> str:
    """Check that the two vocabularies are the same map from token to id, and that both tokenizers
    render the first prompts alike.

    Raises: ValueError naming the token with the lowest id that differs; UserWarning with both
        renderings of a prompt where they differ: the teacher scores the policy's.
    """
    different = differing_token(loaded.tokenizer, teacher.tokenizer)
    if different is not None:
        i, policy_token, teacher_token = different
        raise ValueError(
            f"{teacher.key} must have the policy's tokenizer, got another: token {i} is "
            f"{policy_token!r} for the policy and {teacher_token!r} for the "
            "teacher; choose two models of one family, or do without a teacher: --preset grpo"
        )
    doubt = _teacher_rendering(config, loaded, teacher.tokenizer)
    return _with_doubts(
        f"the same {len(loaded.tokenizer.get_vocab()):,} tokens", [doubt] if doubt else []
    )


def check_server_tokenizer(config: TrainConfig, loaded: Loaded, server: TeacherClient) -> str:
    """Check that the tokens of the teacher's server are the policy's, and that both chat templates
    render the first prompts alike, where the server says its own.

    Raises: ValueError as check_same_tokens; UserWarning as check_tokenizers.
    """
    detail = check_same_tokens(server, loaded.tokenizer)
    if server.chat_template is UNKNOWN:
        return f"{detail}; its chat template is not known"
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.chat_template = server.chat_template
    doubt = _teacher_rendering(config, loaded, tokenizer)
    return _with_doubts(detail, [doubt] if doubt else [])


def _teacher_rendering(config: TrainConfig, loaded: Loaded, teacher: Any) -> str | None:
    """Say how a teacher's tokenizer renders a prompt where that is not the policy's rendering."""
    tokenizer = loaded.tokenizer
    for example in loaded.examples[:PROBE_PROMPTS]:
        ids = encode_prompt(tokenizer, example, config.data)
        try:
            teacher_ids = encode_text(teacher, example.content, config.data)
        except PromptError as error:
            return f"the teacher's tokenizer renders no prompt: {error}"
        if ids != teacher_ids:
            texts = [tokenizer.decode(one) for one in (ids, teacher_ids)]
            if texts[0] == texts[1]:
                texts = [
                    " ".join(tokenizer.convert_ids_to_tokens(one)) for one in (ids, teacher_ids)
                ]
            return (
                f"the teacher's tokenizer renders a prompt as {shown(texts[1])}, the policy's as "
                f"{shown(texts[0])}: the teacher scores the policy's; if it learnt from its own, "
                "give the policy the teacher's chat_template"
            )
    return None
