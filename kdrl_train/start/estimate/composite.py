"""What model.reference takes beside a teacher: its states, and a copy of both heads as one."""

from kdrl_train.start.estimate.case import Case
from kdrl_train.start.estimate.terms import Term, product


def composite_terms(case: Case) -> list[Term]:
    """Lists the bytes of kk.composite_teacher: hidden states and heads of both, side by side.

    The weights of the reference are those of another teacher.
    """
    teacher, reference = case.teacher, case.reference
    if teacher is None or reference is None:
        return []
    b, width = (case.dtype.itemsize, "B"), (teacher.hidden + reference.hidden, "H of both")
    columns = (min(teacher.vocabulary, reference.vocabulary), "V")
    tokens, states = (case.pack_tokens, "tokens"), (2 * reference.hidden + teacher.hidden, "H")
    return [
        product("states of teacher and reference", ("head",), [b, tokens, states]),
        product("heads of teacher and reference", ("head",), [b, columns, width]),
    ]
