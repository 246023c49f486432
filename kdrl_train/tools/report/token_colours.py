"""Samples side by side: the same prompt in each group, each token tinted by what it was taught."""

from collections.abc import Sequence

from kdrl_train.runfolder.jsonl import Record
from kdrl_train.tools.report.blocks import Block, Note, Sample, Samples, Section, Tints, Token
from kdrl_train.tools.report.runs import Group, RunData
from kdrl_train.tools.report.svg import number

STRENGTHS = (0.1, 0.5, 2.0)
"""|l| in nats from which a tint is weak, middle, strong."""
PUSHES = (1e-6, 0.5)
"""|A - pull| from which the line below a token is thin, thick."""
PROMPTS = 3
"""Shown of each step."""
MOST_TOKENS = 400
"""Tinted of a completion; the rest is plain text."""
STRONGEST = 5
LEGEND = (
    "Background: the gap l = log p - log q of the sampled token, p student, q teacher; none where "
    "nothing was distilled. Line below: push of the update, advantage A less the teacher's pull (A "
    "less kd weight · l for k2 and rkl, else A). Point at a token for its numbers."
)
LOOKS = (
    ("n1", "l ≤ -0.1: the teacher likes it more"),
    ("n2", "≤ -0.5"),
    ("n3", "≤ -2 nats"),
    ("p1", "l ≥ 0.1: the teacher likes it less"),
    ("p2", "≥ 0.5"),
    ("p3", "≥ 2 nats"),
    ("u1", "pushed up"),
    ("u2", "by 0.5 and more"),
    ("d1", "pushed down"),
    ("d2", "by 0.5 and more"),
    ("empty", "a token without text of its own, as the end of a sequence"),
)


def section(groups: Sequence[Group]) -> Section:
    """Samples of the first and the last step that the groups have in common, of a run of each."""
    runs = _representatives(groups)
    shown = [(group, run) for group, run in zip(groups, runs, strict=True) if run is not None]
    if not shown:
        return Section("samples", "Samples", [Note("These runs have recorded none.")])
    common = sorted(set.intersection(*(set(run.sampled) for _, run in shown)))
    blocks: list[Block] = [Note(LEGEND), Tints(LOOKS)]
    for step in dict.fromkeys([*common[:1], *common[-1:]]):
        blocks += _step([(group, run, step) for group, run in shown])
    if not common:
        blocks += _step([(group, run, run.sampled[-1]) for group, run in shown])
    return Section("samples", "Samples", blocks)


def _representatives(groups: Sequence[Group]) -> list[RunData | None]:
    """A run of each group that has samples: of the seed that most groups have."""
    seeds = [run.seed for group in groups for run in group.runs if run.sampled]
    best = max(seeds, key=seeds.count, default=None)
    found = []
    for group in groups:
        sampled = [run for run in group.runs if run.sampled]
        found.append(next((r for r in sampled if r.seed == best), sampled[0] if sampled else None))
    return found


def _step(shown: list[tuple[Group, RunData, int]]) -> list[Block]:
    """The prompts that most groups have at their steps, each with its first completion there."""
    found: dict[str, list[Sample]] = {}
    for group, run, step in shown:
        own: dict[str, Sample] = {}
        for row in run.samples(step):
            prompt = row["prompt"].strip()
            if prompt not in own:
                own[prompt] = sample(row, group.name, run.settings.get("method.kd"))
        for prompt, one in own.items():
            found.setdefault(prompt, []).append(one)
    prompts = sorted(found, key=lambda prompt: -len(found[prompt]))[:PROMPTS]
    steps = ", ".join(str(at) for at in sorted({step + 1 for _, _, step in shown}))
    return [Samples(f"Step {steps}", prompt, found[prompt]) for prompt in prompts]


def sample(row: Record, group: str, kd: str | None) -> Sample:
    """One line of samples/ for the page; lines of older runs lack what they lack."""
    text, chars = row["completion"], row.get("token_chars")
    gaps = row.get("log_ratio") or []
    advantage, weight = row.get("advantage"), row.get("kd_weight") or 0.0
    tokens, end, read = [], 0, 0
    for i, count in enumerate((chars or [])[:MOST_TOKENS]):
        read, end = end, end + count
        gap = gaps[i] if i < len(gaps) else None
        push = advantage
        if gap is not None and advantage is not None and kd in ("k2", "rkl"):
            push = advantage - weight * gap
        words = f"{text[read:end]!r}" if count else "no text of its own"
        words += f"\nl {_signed(gap)}\nA {_signed(advantage)}\npush {_signed(push)}"
        classes = " ".join(filter(None, (_tint(gap), _line(push), "" if count else "empty")))
        tokens.append(Token(text[read:end], classes, words))
    known = [(abs(gap), i) for i, gap in enumerate(gaps[: len(tokens)]) if gap is not None]
    largest = [i for _, i in sorted(known, reverse=True)[:STRONGEST]]
    strongest = [(repr(tokens[i].text), _signed(gaps[i])) for i in largest]
    reward = row.get("reward")
    facts = {
        "verdict": row.get("outcome") or ("-" if reward is None else "right" * (reward > 0)),
        "reward": number(reward),
        "advantage": _signed(advantage),
        "kd weight": number(row.get("kd_weight")),
        "gold answer": str(row.get("answer", "-")),
        "tokens": f"{row.get('tokens', '-')}{' (cut)' if row.get('truncated') else ''}",
    }
    right = None if reward is None else reward > 0
    return Sample(group, [*facts.items()], right, tokens, text[end:], strongest)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def _tint(gap: float | None) -> str:
    """Class of the background: p1 to p3, n1 to n3, or none."""
    strength = 0 if gap is None else sum(abs(gap) >= one for one in STRENGTHS)
    return "" if gap is None or not strength else f"{'p' if gap > 0 else 'n'}{strength}"


def _line(push: float | None) -> str:
    """Class of the line below: u1, u2, d1, d2, or none."""
    strength = 0 if push is None else sum(abs(push) >= one for one in PUSHES)
    return "" if push is None or not strength else f"{'u' if push > 0 else 'd'}{strength}"
