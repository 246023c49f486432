"""Prompts before the first step: what they hold, and what ends a completion."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdrl_train.batch import Example
from kdrl_train.config import (
    DataConfig,
    TrainConfig,
)
from kdrl_train.model.eos import ordinary_ends
from kdrl_train.model.policy import Policy
from kdrl_train.start import duplicates, preflight, prompts
from kdrl_train.start.load import Loaded, load, read_problems
from tests.train.start.loaded import warning, with_teacher


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def tokenizers(settings: TrainConfig, loaded: Loaded) -> str:
    return prompts.check_tokenizers(settings, loaded, loaded.teachers[0])


def test_problems_with_the_text_of_others_are_named() -> None:
    rows = [("a:1", "1+1", "2"), ("a:2", "1+1", "2"), ("a:3", "2+2", "4"), ("a:4", "1+1", "3")]
    examples = [Example(*row) for row in rows]
    assert duplicates.repeated(examples[:3]) == []
    assert duplicates.learnt_as_well(examples, [Example("b:1", "3+3", "6")], "eval.data") == []
    held_out = [Example("b:1", "3+3", "6"), Example("b:2", "2+2", "4")]
    doubts = duplicates.repeated(examples)
    assert doubts + duplicates.learnt_as_well(examples, held_out, "eval.sets.b") == [
        "1 of 4 problems have the text of another one and not its gold answer, a:4 first, '3', and "
        "a:1, '2': correct one",
        "1 of 2 problems of eval.sets.b are learnt from as well, b:2 first, as a:3: their accuracy "
        "says little of problems that are new",
    ]


def test_repeated_problems_are_a_warning(settings: TrainConfig, loaded: Loaded) -> None:
    again = replace(loaded.examples[0], id="again", gold="none")
    doubt = warning(
        prompts.check_prompts, settings, replace(loaded, examples=[*loaded.examples, again])
    )
    assert doubt.startswith("1 of 21 problems have the text of another one")


def test_another_vocabulary_is_named_by_its_first_token(
    settings: TrainConfig, loaded: Loaded
) -> None:
    other = copy.deepcopy(loaded.tokenizer)
    other.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=r"token 258 is None for the policy and '<extra>' for the"):
        tokenizers(settings, with_teacher(loaded, tokenizer=other))
    assert tokenizers(settings, loaded) == "the same 258 tokens"


def test_another_template_of_the_teacher_is_shown(settings: TrainConfig, loaded: Loaded) -> None:
    asks = "Q{{ messages[0]['content'] }}A"
    policy = with_template(loaded.tokenizer, asks)
    same = with_teacher(replace(loaded, tokenizer=policy), tokenizer=with_template(policy, asks))
    assert tokenizers(settings, same) == "the same 258 tokens"
    other = with_teacher(same, tokenizer=with_template(policy, asks.replace("Q", "U")))
    doubt = warning(tokenizers, settings, other)
    assert "renders a prompt as 'U0+0=A', the policy's as 'Q0+0=A': the teacher scores" in doubt
    without = with_teacher(same, tokenizer=with_template(policy, None))
    assert "as '0+0=', the policy's as 'Q0+0=A'" in warning(tokenizers, settings, without)
    plain = replace(settings, data=replace(settings.data, chat_template=False))
    assert tokenizers(plain, other) == "the same 258 tokens"
    fails = with_teacher(same, tokenizer=with_template(policy, "{{ raise_exception('no') }}"))
    assert "renders no prompt: the chat template must" in warning(tokenizers, settings, fails)


def test_other_tokens_of_the_same_text_are_shown(settings: TrainConfig, loaded: Loaded) -> None:
    """The vocabularies are equal; the teacher's tokenizer writes a space before a text."""
    other = copy.deepcopy(loaded.tokenizer)
    space = pre_tokenizers.ByteLevel(add_prefix_space=True)
    other.backend_tokenizer.pre_tokenizer = space
    doubt = warning(tokenizers, settings, with_teacher(loaded, tokenizer=other))
    assert "renders a prompt as ' 0+0=', the policy's as '0+0='" in doubt
    unmerged = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    unmerged["pre_tokenizer"] = None
    unmerged["model"]["vocab"]["0+"] = 258
    merged = copy.deepcopy(unmerged)
    merged["model"]["merges"] = [["0", "+"]]
    policy, teacher = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(one)))
        for one in (unmerged, merged)
    )
    merges = with_teacher(replace(loaded, tokenizer=policy), tokenizer=teacher)
    doubt = warning(tokenizers, settings, merges)
    assert "renders a prompt as '0+ 0 =', the policy's as '0 + 0 ='" in doubt


def test_ends_of_sequence_must_agree(
    settings: TrainConfig, loaded: Loaded, tiny: Callable[..., Any]
) -> None:
    assert prompts.check_eos(settings, loaded) == "[0] ['<|endoftext|>']"
    loaded.teachers[0].model.model.generation_config.eos_token_id = [0, 7]
    with pytest.raises(ValueError, match=r"the teacher must end sequences .* got \[7\]"):
        prompts.check_eos(settings, loaded)
    mask = replace(settings, method=replace(settings.method, kd_eos="mask"))
    masked = "[0] ['<|endoftext|>']; the teacher also ends with [7], so ends are not distilled"
    assert prompts.check_eos(mask, loaded) == masked
    loaded.policy.model.generation_config.eos_token_id = [0, 7]
    doubt = warning(prompts.check_eos, settings, loaded)
    token = loaded.tokenizer.convert_ids_to_tokens(7)
    assert doubt.startswith(f"completions end at [7] ([{token!r}]) too, which are plain text to")
    assert doubt.endswith(f"[0, 7] ['<|endoftext|>', {token!r}]")
    assert ordinary_ends(loaded.tokenizer, [0, 1, len(loaded.tokenizer)]) == []
    model = tiny("llama")
    model.generation_config.eos_token_id = 9
    alone = replace(loaded, teachers=(), policy=Policy(model, TrainConfig().method))
    with pytest.raises(
        ValueError, match=r"got 0 \('<\|endoftext\|>'\) from its tokenizer and \[9\]"
    ):
        prompts.check_eos(settings, alone)


TURNS = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + END }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("end", "doubtful"),
    [
        ("'<|im_end|>\\n'", True),
        ("' <|im_end|>\\n<|endoftext|>'", True),  # the model writes the first one first
        ("'<|endoftext|>'", False),
        ("'\\n'", False),  # no token that could end a completion
        ("'<|im_end|>' if loop.last and m.role == 'user' else '<|endoftext|>'", False),
    ],
)
def test_the_end_of_a_turn_must_end_a_completion(
    settings: TrainConfig, loaded: Loaded, end: str, doubtful: bool
) -> None:
    tokenizer = with_template(loaded.tokenizer, TURNS.replace("END", f"({end})"))
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    base = replace(loaded, tokenizer=tokenizer, teachers=())
    if not doubtful:
        assert prompts.check_eos(settings, base) == "[0] ['<|endoftext|>']"
        return
    doubt = warning(prompts.check_eos, settings, base)
    assert "ends the assistant's turn with 258 ('<|im_end|>'), which does not end a" in doubt
    assert doubt.endswith("[0] ['<|endoftext|>']")
    plain = replace(settings, data=replace(settings.data, chat_template=False))
    assert prompts.check_eos(plain, base) == "[0] ['<|endoftext|>']"
    base.policy.model.generation_config.eos_token_id = [0, 258]
    assert prompts.check_eos(settings, base) == "[0, 258] ['<|endoftext|>', '<|im_end|>']"


def test_arguments_that_the_chat_template_does_not_read_are_a_warning(
    settings: TrainConfig, loaded: Loaded
) -> None:
    switch = "{% if enable_thinking is defined and not enable_thinking %}/no{% endif %}"
    tokenizer = with_template(loaded.tokenizer, "Q{{ messages[0]['content'] }}A" + switch)
    base = replace(loaded, tokenizer=tokenizer)

    def having(**arguments: Any) -> TrainConfig:
        return replace(settings, data=replace(settings.data, template_arguments=arguments))

    shown = prompts.check_first_prompt(settings, base)
    assert shown == "'Q0+0=A'; the chat template's switch enable_thinking keeps its default"
    assert prompts.check_first_prompt(having(enable_thinking=False), base) == "'Q0+0=A/no'"
    default = warning(prompts.check_first_prompt, having(enable_thinking=True), base)
    assert "template_arguments.enable_thinking = True changes nothing: that is its def" in default
    doubtful = having(enable_thinking=False, effort="low")
    unread = warning(prompts.check_first_prompt, doubtful, base)
    assert unread.startswith(
        "data.template_arguments.effort = 'low' changes nothing: the chat template does not read it"
    )


def test_messages_are_shown_and_looked_at(settings: TrainConfig, loaded: Loaded) -> None:
    messages = ({"role": "system", "content": "brief"}, {"role": "user", "content": "2+2="})
    example = replace(loaded.examples[0], messages=messages)
    whole = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    base = replace(loaded, examples=[example], tokenizer=with_template(loaded.tokenizer, whole))
    assert prompts.check_first_prompt(settings, base) == "'[brief][2+2=]'"
    last = with_template(loaded.tokenizer, "{{ messages[-1]['content'] }}")
    doubt = warning(prompts.check_first_prompt, settings, replace(base, tokenizer=last))
    assert doubt.startswith("the chat template leaves out or changes the problem")
    ends = replace(example, messages=(messages[0], {"role": "user", "content": "<|endoftext|>"}))
    doubt = warning(prompts.check_first_prompt, settings, replace(base, examples=[ends]))
    assert "the text of a problem holds <|endoftext|>" in doubt


def test_a_turn_must_not_end_in_text(settings: TrainConfig, loaded: Loaded) -> None:
    """ChatML on a base model whose tokenizer does not have its tokens."""
    tokenizer = with_template(loaded.tokenizer, TURNS.replace("END", "'<|im_end|>\\n'"))
    base = replace(loaded, tokenizer=tokenizer, teachers=())
    doubt = warning(prompts.check_eos, settings, base)
    assert "turn with the text '<|im_end|>', which is no token and ends no completion" in doubt
    plain = replace(settings, data=replace(settings.data, chat_template=False))
    assert prompts.check_eos(plain, base) == "[0] ['<|endoftext|>']"


def test_the_first_prompt_is_shown_with_its_special_tokens(
    settings: TrainConfig, loaded: Loaded
) -> None:
    assert prompts.check_first_prompt(settings, loaded) == "'0+0='"
    tokenizer = with_template(
        loaded.tokenizer, "<|pad|>{{ messages[0]['content'] }}\n<|endoftext|>:"
    )
    chat = replace(loaded, tokenizer=tokenizer)
    assert prompts.check_first_prompt(settings, chat) == r"'<|pad|>0+0=\n<|endoftext|>:'"
    switch = (
        "{{ messages[0]['content'] }}{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    thinking = replace(loaded, tokenizer=with_template(loaded.tokenizer, switch))
    detail = prompts.check_first_prompt(settings, thinking)
    assert detail == "'0+0='; the chat template's switch enable_thinking keeps its default"
    assert prompts.shown("a" * 301 + "b" * 400) == f"'{'a' * 300} [...] {'b' * 300}'"


@pytest.mark.parametrize(
    ("template", "data", "doubt"),
    [
        ("{{ messages[0]['content'] }}<|endoftext|>", {}, "20 of 20 prompts end with '<|endoftext"),
        ("<|pad|>u<|pad|>{{ messages[-1]['content'] }}", {}, "20 of 20 prompts hold the start of"),
        (
            "{{ messages[-1]['content'] }}",
            {"system_prompt": "Brief."},
            "out or changes data.system",
        ),
        ("{{ messages[0]['content'][0] }}", {}, "leaves out or changes the problem"),
        ("{{ messages[0]['content'] }}<think>\n", {}, "early_bytes must not expect it"),
        (
            "u{{ messages[0]['content'] }}",
            {"prompt_template": "<|pad|>{prompt}<|endoftext|>:"},
            "the text of a problem holds <|pad|>, <|endoftext|>, and the chat template is applied",
        ),
        (None, {"prompt_template": r"{prompt}\nAnswer:"}, "data.prompt_template holds a backslash"),
        (None, {"prompt_template": r"{prompt}\n"}, "a backslash and 'n', which are no line break"),
        (None, {"prompt_template": r"\nplease solve {prompt}"}, "a backslash and 'n'"),
        (None, {"prompt_template": r"Q:\t{prompt}"}, "a backslash and 't'"),
        (None, {"teacher_template": r"{prompt}\n"}, "data.teacher_template holds a backslash"),
        ("{{ messages | map(attribute='content') | join }}", {"system_prompt": r"a\n\nb"}, r"em_p"),
    ],
)
def test_a_doubtful_way_to_write_prompts_is_named(
    settings: TrainConfig, loaded: Loaded, template: str | None, data: dict[str, str], doubt: str
) -> None:
    reward = replace(settings.reward, function="early_bytes")
    written = replace(settings, data=replace(settings.data, **data), reward=reward)
    tokenizer = with_template(loaded.tokenizer, template)
    tokenizer.bos_token = "<|pad|>"
    loaded = with_data(written, loaded, tokenizer)
    shown = warning(prompts.check_first_prompt, written, loaded)
    assert doubt in shown, shown
    assert len(shown.split("; ")) <= 4, shown  # this doubt, its advice and the prompt; no other


def with_data(settings: TrainConfig, loaded: Loaded, tokenizer: Any) -> Loaded:
    """Read the problems of the settings, for a tokenizer."""
    examples, facts = read_problems(settings.data, tokenizer)
    return replace(loaded, tokenizer=tokenizer, examples=examples, prompts=facts)


@pytest.mark.parametrize(
    "text", [r"{prompt} $\nabla f \neq \nu$, \text{and} \times", r"{prompt}: a \\ b \\n", "a\nb"]
)
def test_latex_and_line_breaks_are_no_mistakes(
    settings: TrainConfig, loaded: Loaded, text: str
) -> None:
    template = text if "{prompt}" in text else f"{{prompt}}{text}"
    written = replace(settings, data=replace(settings.data, prompt_template=template))
    prompts.check_first_prompt(written, with_data(written, loaded, loaded.tokenizer))


def test_held_out_problems_written_otherwise_are_named(held: TrainConfig) -> None:
    other = replace(held, data=replace(held.data, prompt_template="{prompt} Box it."))
    doubt = warning(prompts.check_first_prompt, other, load(other))
    assert "eval.data and data differ in prompt_template;" in doubt
    same = replace(
        other, eval=replace(held.eval, data=replace(other.data, path=held.eval.data.path))
    )
    assert prompts.check_first_prompt(same, load(same)) == "'0+0= Box it.'"


def test_the_first_prompt_commands_no_terminal(loaded: Loaded) -> None:
    hostile = Example("set:1", "a\x1b[2Jb\nc", "1")
    line = prompts.first_prompt(loaded.tokenizer, hostile, DataConfig())
    assert line == r"'a\x1b[2Jb\nc'"


def test_what_the_tokenizer_puts_behind_a_text_is_named(
    settings: TrainConfig, loaded: Loaded
) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    detail = prompts.check_first_prompt(settings, replace(loaded, tokenizer=tokenizer))
    assert detail.startswith("'0+0='; ['<|endoftext|>'], which the tokenizer puts behind a text")


def test_a_template_that_fails_is_a_line_of_the_table(
    settings: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(settings.model.policy, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    tokenizer.save_pretrained(tmp_path / "policy")
    model = replace(settings.model, policy=str(tmp_path / "policy"))
    assert preflight.main(replace(settings, model=model)) == 1
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "prompts failed prompt task.jsonl:1: the chat template must render a user's message, got"
        in out
    )


def test_prompts_that_sft_wrote_otherwise_are_a_warning(
    settings: TrainConfig, loaded: Loaded, tmp_path: Path
) -> None:
    (tmp_path / "sft.yaml").write_text('data: {prompt_template: "Q {prompt}"}')
    taught = replace(settings, model=replace(settings.model, policy=str(tmp_path)))
    doubt = warning(prompts.check_first_prompt, taught, loaded)
    assert doubt.startswith("the policy learnt to read prompts with data.prompt_template 'Q {pr")
