"""rendering: one start of sequence, no end, and templates that fail in their own words."""

import inspect
import signal
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdrl_train.batch import Example
from kdrl_train.config import DataConfig
from kdrl_train.config.rollouts import RESERVED
from kdrl_train.rollouts import rendering
from kdrl_train.rollouts.rendering import PromptError, completion_text, encode_text
from kdrl_train.rollouts.reward_inputs import answer_inputs

WORDS = ["<s>", "</s>", "[X]", "[Y]", "what", "is", "1", "user", "system", "be"]
IDS = {word: i for i, word in enumerate(WORDS)}


def tokenizer_with(single: str, template: str | None = None) -> Any:
    """A tokenizer of whole words that puts around a text what `single` says."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="[X]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, IDS[word]) for word in single.split() if word != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize(
    ("single", "text", "prompt"),
    [
        ("$A", "what is 1", "what is 1"),
        ("<s> $A", "what is 1", "<s> what is 1"),
        ("$A </s>", "what is 1", "what is 1"),
        ("<s> $A </s>", "what is 1", "<s> what is 1"),
        ("[X] [Y] $A [Y] </s>", "what is 1", "[X] [Y] what is 1"),
        ("<s> $A </s>", "<s> what is 1", "<s> what is 1"),
        ("<s> $A", "<s> <s> what is 1", "<s> what is 1"),
        ("[X] [Y] $A", "[X] [Y] what", "[X] [Y] what"),
        ("<s> $A", "what </s> <s> is", "<s> what </s> <s> is"),  # written by the user, inside
        ("<s> $A </s>", "what </s>", "<s> what </s>"),  # the same: the preflight warns of it
    ],
)
def test_a_text_starts_once_and_does_not_end(single: str, text: str, prompt: str) -> None:
    assert words(encode_text(tokenizer_with(single), text, DataConfig())) == prompt


@pytest.mark.parametrize("text", ["what is 1", "<s> what is 1"])
def test_a_template_and_a_tokenizer_that_both_write_the_start(text: str) -> None:
    template = "{{ bos_token + ' ' + messages[0]['content'] + ' user' }}"
    tokenizer = tokenizer_with("<s> $A </s>", template)
    assert words(encode_text(tokenizer, text, DataConfig())) == "<s> what is 1 user"


SWITCH = (
    "{{ messages[0]['content'] }}{% if enable_thinking is defined and not enable_thinking %} [Y]"
    "{% endif %}"
)


def test_a_template_reads_its_arguments() -> None:
    tokenizer = tokenizer_with("$A", SWITCH)
    for value, prompt in ((True, "what"), (False, "what [Y]")):
        config = DataConfig(template_arguments={"enable_thinking": value})
        assert words(encode_text(tokenizer, "what", config)) == prompt
    assert words(encode_text(tokenizer, "what", DataConfig())) == "what"
    with pytest.raises(PromptError, match=r"arguments must be empty where no chat template is"):
        encode_text(tokenizer_with("$A"), "what", config)


def test_every_argument_of_transformers_is_reserved() -> None:
    names = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
    assert set(names) <= set(RESERVED)
    for name in names:
        with pytest.raises(ValueError, match=rf"template_arguments must be names .* got '{name}'"):
            DataConfig(template_arguments={name: 1})


def test_messages_that_a_template_refuses_are_named() -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "what"}]
    tokenizer = tokenizer_with("$A", "{{ messages[1]['content'] }}")
    assert words(encode_text(tokenizer, messages, DataConfig())) == "what"
    expected = r"must render the problem's messages, got TemplateError: System role not supported: "
    with pytest.raises(PromptError, match=expected):
        encode_text(tokenizer_with("$A", REFUSES), messages, DataConfig())


REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ messages[0]['content'] }}"
)


def test_a_template_without_system_messages_names_the_remedy() -> None:
    tokenizer = tokenizer_with("$A", REFUSES)
    assert words(encode_text(tokenizer, "what", DataConfig())) == "what"
    expected = (
        r"must take a system message, got TemplateError: System role not supported: write the text "
        r"of data\.system_prompt into data\.prompt_template, and unset data\.system_prompt"
    )
    with pytest.raises(PromptError, match=expected):
        encode_text(tokenizer, "what", DataConfig(system_prompt="be"))


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ raise_exception('no date') }}", "TemplateError: no date"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
        ("{{ messages[0]['content']['text']['a'] }}", "UndefinedError: "),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ({"tool_use": "{{ 1 }}"}, "ValueError: .*multiple chat templates.*no default"),
    ],
)
@pytest.mark.parametrize("system", [None, "be"])
def test_a_template_that_fails_says_why(template: Any, cause: str, system: str | None) -> None:
    tokenizer = tokenizer_with("$A")
    tokenizer.chat_template = template
    expected = rf"(?s)must render a user's message, got {cause}.*: correct chat_template"
    with pytest.raises(PromptError, match=expected):
        encode_text(tokenizer, "what", DataConfig(system_prompt=system))


def test_a_completion_keeps_its_spaces() -> None:
    """A clean-up, for which many a tokenizer_config.json asks, would make 5! of 5 !."""
    words = ["</s>", "5", "!", "1", ","]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=True
    )
    ids = [1, 2, 3, 4, 1, 0]
    assert tokenizer.decode(ids[:2]) == "5!"
    text = completion_text(tokenizer, ids, truncated=False)
    assert text == "5 ! 1 , 5"
    examples = [Example(id="1", prompt="what", gold="5")]
    assert answer_inputs({"raw_completion"}, examples, [text], tokenizer) == [
        {"raw_completion": text}
    ]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the alarm is POSIX's")
@pytest.mark.fault("hostile model folder")
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro f() %}{% for i in range(9) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",  # jinja's sandbox refuses this one itself
    ],
)
def test_an_endless_template_ends(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "TEMPLATE_S", 0.2)
    earlier = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    start = time.monotonic()
    try:
        with pytest.raises(PromptError, match=r"the chat template must (render|not)"):
            encode_text(tokenizer_with("$A", template), "what is 1", DataConfig())
        assert time.monotonic() - start < 20  # 0.3 s, on a machine that does nothing else
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900  # an alarm of somebody else still is
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
