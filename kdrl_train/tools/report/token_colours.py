"""Shows samples of the same prompt side by side, each token coloured by its teacher log-ratio."""

from collections.abc import Sequence

from kdrl_train.runfolder.jsonl import Record
from kdrl_train.tools.report.blocks import (
    Block,
    Note,
    PromptSamples,
    Sample,
    Section,
    Token,
    TokenLegend,
)
from kdrl_train.tools.report.runs import RunData, RunGroup
from kdrl_train.tools.report.svg import number

STRENGTHS = (0.1, 0.5, 2.0)
"""|l| in nats from which a colour is weak, medium, strong."""
PUSHES = (1e-6, 0.5)
"""|push| from which the line below a token is thin, thick."""
PROMPTS = 3
"""Prompts shown of each step."""
MOST_TOKENS = 400
"""Tokens coloured in a completion; the rest is plain text."""
STRONGEST = 5
LEGEND = (
    "The background shows the teacher log-ratio l = log p - log q of the sampled token (p: "
    "student, q: teacher), if the token is distilled. The line below shows the push of the update: "
    "advantage A - kd weight · l for k2 and rkl, else A. Point at a token to read its numbers."
)
LOOKS = (
    ("n1", "l ≤ -0.1 nats: more probable under the teacher"),
    ("n2", "l ≤ -0.5"),
    ("n3", "l ≤ -2"),
    ("p1", "l ≥ 0.1 nats: less probable under the teacher"),
    ("p2", "l ≥ 0.5"),
    ("p3", "l ≥ 2"),
    ("u1", "pushed up"),
    ("u2", "pushed up by 0.5 or more"),
    ("d1", "pushed down"),
    ("d2", "pushed down by 0.5 or more"),
    ("empty", "a token without text, such as the end of the sequence"),
)


def section(groups: Sequence[RunGroup]) -> Section:
    """Shows samples of one run of each group, of the first and the last step that all of them
    saved."""
    runs = _representatives(groups)
    shown = [(group, run) for group, run in zip(groups, runs, strict=True) if run is not None]
    if not shown:
        return Section("samples", "Samples", [Note("These runs recorded no samples.")])
    common = sorted(set.intersection(*(set(run.sampled) for _, run in shown)))
    blocks: list[Block] = [Note(LEGEND), TokenLegend(LOOKS)]
    for step in dict.fromkeys([*common[:1], *common[-1:]]):
        blocks += _step([(group, run, step) for group, run in shown])
    if not common:
        blocks += _step([(group, run, run.sampled[-1]) for group, run in shown])
    return Section("samples", "Samples", blocks)


def _representatives(groups: Sequence[RunGroup]) -> list[RunData | None]:
    """Chooses a run with samples from each group, if possible of the seed that most groups have."""
    seeds = [run.seed for group in groups for run in group.runs if run.sampled]
    best = max(seeds, key=seeds.count, default=None)
    chosen = []
    for group in groups:
        sampled = [run for run in group.runs if run.sampled]
        chosen.append(next((r for r in sampled if r.seed == best), sampled[0] if sampled else None))
    return chosen


def _step(shown: list[tuple[RunGroup, RunData, int]]) -> list[Block]:
    """Shows the prompts that most groups have, with the first completion of each group."""
    by_prompt: dict[str, list[Sample]] = {}
    for group, run, step in shown:
        firsts: dict[str, Sample] = {}
        for record in run.samples(step):
            prompt = record["prompt"].strip()
            if prompt not in firsts:
                firsts[prompt] = sample(record, group.name, run.settings.get("method.kd"))
        for prompt, first in firsts.items():
            by_prompt.setdefault(prompt, []).append(first)
    prompts = sorted(by_prompt, key=lambda prompt: -len(by_prompt[prompt]))[:PROMPTS]
    steps = ", ".join(str(at) for at in sorted({step + 1 for _, _, step in shown}))
    return [PromptSamples(f"Step {steps}", prompt, by_prompt[prompt]) for prompt in prompts]


def sample(record: Record, group: str, kd: str | None) -> Sample:
    """Prepares a line of samples/ for the page; an older run may lack some of its keys."""
    text, log_ratios = record["completion"], record.get("teacher_log_ratio") or []
    tokens = _tokens(record, log_ratios, kd)
    sizes = [(abs(x), i) for i, x in enumerate(log_ratios[: len(tokens)]) if x is not None]
    largest = [i for _, i in sorted(sizes, reverse=True)[:STRONGEST]]
    strongest = [(repr(tokens[i].text), _signed(log_ratios[i])) for i in largest]
    reward, outcome = record.get("reward"), record.get("outcome")
    if outcome is None and reward is not None:  # written before there were verdicts
        outcome = "right" if reward > 0 else "wrong"
    facts = {
        "verdict": outcome or "-",
        "reward": number(reward),
        **(_rewards(record) if len(_rewards(record)) > 1 else {}),
        "advantage": _signed(record.get("advantage")),
        "kd weight": number(record.get("kd_weight")),
        "gold answer": str(record.get("answer", "-")),
        "tokens": f"{record.get('tokens', '-')}{' (cut)' if record.get('truncated') else ''}",
    }
    right = None if outcome is None else outcome == "right"
    rest = text[sum(len(token.text) for token in tokens) :]
    return Sample(group, [*facts.items()], right, tokens, rest, strongest)


def _rewards(record: Record) -> dict[str, str]:
    """Writes the value of each reward, by its name."""
    return {f"reward/{k}": number(v) for k, v in (record.get("rewards") or {}).items()}


def _tokens(record: Record, log_ratios: list[float | None], kd: str | None) -> list[Token]:
    """Cuts a completion into tokens with their colours."""
    text, chars = record["completion"], record.get("token_chars") or []
    advantage, weight = record.get("advantage"), record.get("kd_weight") or 0.0
    tokens, end = [], 0
    for i, count in enumerate(chars[:MOST_TOKENS]):
        begin, end = end, end + count
        log_ratio = log_ratios[i] if i < len(log_ratios) else None
        push = advantage
        if log_ratio is not None and advantage is not None and kd in ("k2", "rkl"):
            push = advantage - weight * log_ratio
        words = f"{text[begin:end]!r}" if count else "no text"
        words += f"\nl {_signed(log_ratio)}\nA {_signed(advantage)}\npush {_signed(push)}"
        classes = (_background(log_ratio), _line(push), "" if count else "empty")
        tokens.append(Token(text[begin:end], " ".join(filter(None, classes)), words))
    return tokens


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def _background(log_ratio: float | None) -> str:
    """Returns the class of the background: p1 to p3, n1 to n3, or none."""
    return _class(log_ratio, STRENGTHS, "pn")


def _line(push: float | None) -> str:
    """Returns the class of the line below: u1, u2, d1, d2, or none."""
    return _class(push, PUSHES, "ud")


def _class(value: float | None, thresholds: Sequence[float], letters: str) -> str:
    """Returns the letter of the sign and the number of thresholds that |value| reaches, or ""."""
    strength = 0 if value is None else sum(abs(value) >= threshold for threshold in thresholds)
    return "" if value is None or not strength else f"{letters[value <= 0]}{strength}"
