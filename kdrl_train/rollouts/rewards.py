"""Defines rewards: pure functions of a completion, its gold answer and more, without torch.

The answer that a completion states is what its last closed `\\boxed{}` holds, with the boxes that a
comma, "and" or "or" joins to it; without a box, what follows its last `####` or "answer is" (also
"answer:", "answer ="). A last number alone is not an answer: in a completion that was cut off it is
an intermediate result, and a reward for it would teach the policy to ramble.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from inspect import Parameter
from typing import Any

from kdrl_train.errors import import_users
from kdrl_train.rollouts.answers.comparing import Answer, check_values, equal, spelling
from kdrl_train.rollouts.answers.reading import read
from kdrl_train.rollouts.answers.statement import MAX_ANSWER_CHARS, last_answer
from kdrl_train.rollouts.answers.tokens import UnreadableError

Reward = Callable[..., float | tuple[float, bool]]
"""Maps a completion and more (INPUTS) to a finite number, or to (number, whether it is right)."""
INPUTS = ("completion", "answer", "prompt", "columns", "tokens", "raw_completion", "truncated")
"""What a reward may know of a completion, by the names of its parameters; `gold` is `answer`."""
INPUT_OF = {name: name for name in INPUTS} | {"gold": "answer"}
"""Name of a parameter -> what it gets."""
DRAWN = ("completion", "raw_completion", "tokens")
"""Those of which each reward takes at least one: what the policy has written."""
ReadAnswer = Callable[[str], str | None]
"""Maps a completion to the answer that it votes for; None: it has no vote."""


class UnparseableError(ValueError):
    """A reward raises it where a completion states no answer that it can read.

    The completion gets the reward 0.0, and is counted apart from wrong ones.
    """


def math_reward(completion: str, answer: str) -> float:
    """Return 1.0 where the completion's answer equals the gold answer as mathematics, else 0.0.

    Rational numbers are compared exactly (1,234 = 1234 = 1234.0, 5 1/2 = 11/2), other expressions
    by their values; sets, tuples, intervals, matrices and equations part by part. What counts as
    equal, and what is refused: README.md.

    Args:
        completion: the policy's text; `last_answer` reads its answer.
        answer: the gold answer: a number, LaTeX, a word, or the letter of a choice.
    Raises: UnparseableError where the completion has no readable answer; ValueError where the gold
        answer itself cannot be read, which is an error of the data, never of the policy.
    """
    gold = _read_gold(answer)
    stated = _stated_answer(completion)
    try:
        return float(equal(read(stated), gold))
    except (UnreadableError, RecursionError) as error:
        raise UnparseableError(
            f"answer of the completion must parse, got {stated[:80]!r}: {error}"
        ) from error


def exact_reward(completion: str, answer: str) -> float:
    """Return 1.0 where the completion's answer is the gold answer letter by letter, else 0.0.

    White space around the two is ignored.

    Raises: UnparseableError for a completion without an answer.
    """
    return float(_stated_answer(completion).strip() == answer.strip())


def check_readable(gold: str) -> None:
    """Raise ValueError, with the remedy, where `math` cannot read this gold answer."""
    _read_gold(gold)


@lru_cache(maxsize=4096)  # a gold answer is read once, not once per completion of its group
def _read_gold(gold: str) -> Answer:
    """Read a gold answer, all of it. Raises: ValueError, with the remedy."""
    hint = "; it may be a whole solution" if len(gold) > MAX_ANSWER_CHARS else ""
    try:
        answer = read(gold)
        check_values(answer)
    except (UnreadableError, RecursionError) as error:
        raise ValueError(
            "the gold answer must be a number, LaTeX, a word or a choice that math reads whole, "
            f"got {gold[:80]!r}{'...' * (len(gold) > 80)}: {error}{hint}; correct the record, name "
            "another data.answer_column, or set reward.function to exact"
        ) from error
    return answer


def load_reward(name: str) -> Reward:
    """Return the reward function named `math`, `exact`, or `module:function`, which is imported.

    A user's function takes what its parameters name (INPUTS), returns a finite number or (number,
    right), and may raise `UnparseableError`. It must be importable by name, since it runs in other
    processes.

    Raises: ValueError for an unknown name, for a module that is missing or has a mistake, for a
        missing function, and for what was not written as a reward: os.popen would run each
        completion in a shell.
    """
    builtin: dict[str, Reward] = {"math": math_reward, "exact": exact_reward}
    if name in builtin:
        return builtin[name]
    rule = f"reward.function must be math, exact or module:function, got {name!r}"
    module_name, colon, function_name = name.partition(":")
    parts = module_name.split(".")
    if not (colon and function_name and all(map(str.isidentifier, parts))):
        raise ValueError(rule)
    module = import_users(module_name, rule)
    function = getattr(module, function_name, None)
    if not callable(function):
        problem = "is missing from" if function is None else "is not callable in"
        raise ValueError(f"{rule}: {function_name} {problem} {module_name}; name a function in it")
    if not inspect.isfunction(function) or not inputs_of(function):
        raise ValueError(
            f"{rule}: it must be a Python function with the parameters (completion, answer) or "
            f"others of {', '.join(INPUTS)}, and more with defaults alone; write "
            f"`def {function_name}(completion, answer):` in a module of your own, and call there "
            "what you need"
        )
    return function


@lru_cache(maxsize=64)
def inputs_of(reward: Reward) -> dict[str, str]:
    """Return which input each parameter of a reward gets, by the parameter's name.

    A parameter may have underscores around its name; of the first two, _ and __ are completion and
    answer. One with a default gets the input of its name, or keeps the default.

    Returns: nothing for what was not written as a reward. A function such as timeit.timeit(stmt,
        setup) may run what a completion says.
    """
    parameters = inspect.signature(reward).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    inputs = {}
    for place, parameter in enumerate(required):
        name = parameter.name.strip("_") or "".join(INPUTS[:2][place : place + 1])
        is_many = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if is_many or name not in INPUT_OF:
            return {}
        inputs[parameter.name] = INPUT_OF[name]
    if not set(inputs.values()) & set(DRAWN):
        return {}
    named = [p for p in parameters if p.default is not p.empty and p.name in INPUT_OF]
    return inputs | {p.name: INPUT_OF[p.name] for p in named if p.kind != p.POSITIONAL_ONLY}


def call(reward: Reward, inputs: dict[str, Any]) -> object:
    """Call a reward with those of the inputs of a completion that it takes."""
    parameters = inspect.signature(reward).parameters
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, source in inputs_of(reward).items():
        parameter = parameters[name]
        if parameter.kind == Parameter.KEYWORD_ONLY or parameter.default is not parameter.empty:
            named[name] = inputs[source]
        else:
            positional.append(inputs[source])
    return reward(*positional, **named)


def warm_up(reward: Reward) -> None:
    """Make the first completion of a process as cheap as the others.

    For `math` this makes mpmath compute its constants.
    """
    if reward is math_reward:
        math_reward(r"\boxed{\frac{\pi}{x}}", "x^2")


def load_answer(reward: Reward) -> ReadAnswer:
    """Return the function that reads the answer which a completion votes for.

    For `math`, equal numbers vote together, and so do expressions that parse alike. For `exact`,
    the letters of the answer vote. A user's reward may have such a function as its attribute
    `answer`; without it, `last_answer` is used.
    """
    if reward is math_reward:
        return _math_spelling
    return getattr(reward, "answer", last_answer)


def _math_spelling(completion: str) -> str | None:
    """Return one spelling for 1/2, 0.5 and \\frac{1}{2}; None where no answer can be read."""
    stated = last_answer(completion)
    try:
        return None if stated is None else spelling(read(stated))
    except (UnreadableError, RecursionError):
        return None


def _stated_answer(completion: str) -> str:
    """Return the completion's answer; raise UnparseableError where it states none."""
    stated = last_answer(completion)
    if stated is None:
        raise UnparseableError("completion must state an answer: \\boxed{}, #### or 'answer is'")
    return stated
