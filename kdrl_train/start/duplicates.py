"""Names problems with the text of others, among those to learn from and the held-out ones."""

from collections.abc import Sequence

from kdrl_train.batch import Example


def _first_of(examples: Sequence[Example]) -> dict[str, Example]:
    """Return the first problem of each text."""
    first_of: dict[str, Example] = {}
    for example in examples:
        first_of.setdefault(example.prompt, example)
    return first_of


def repeated(examples: Sequence[Example]) -> list[str]:
    """Name problems with the same text whose gold answers differ."""
    doubts, first_of = [], _first_of(examples)
    others = [e for e in examples if first_of[e.prompt].gold != e.gold]
    if others:
        one, other = first_of[others[0].prompt], others[0]
        doubts.append(
            f"{len(others):,} of {len(examples):,} problems have the text of another one and not "
            f"its gold answer, {other.id} first, {other.gold[:80]!r}, and {one.id}, "
            f"{one.gold[:80]!r}: correct one"
        )
    return doubts


def learnt_as_well(
    examples: Sequence[Example], held_out: Sequence[Example], section: str
) -> list[str]:
    """Name held-out problems of a section that have the text of one that is learnt from."""
    first_of = _first_of(examples)
    learnt = [e for e in held_out if e.prompt in first_of]
    if not learnt:
        return []
    return [
        f"{len(learnt):,} of {len(held_out):,} problems of {section} are learnt from as well, "
        f"{learnt[0].id} first, as {first_of[learnt[0].prompt].id}: their accuracy says little "
        "of problems that are new"
    ]
