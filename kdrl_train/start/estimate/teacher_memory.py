"""Predicts the memory that teachers take on one GPU: see memory.py."""

from kdrl_train.start.estimate.case import Case, shorter_packs
from kdrl_train.start.estimate.terms import ALWAYS, LARGER, MORE_GPUS, UPDATE, Term, product


def teacher_terms(case: Case) -> list[Term]:
    """Lists what a teacher in this process holds: weights, its forward pass, and its output.

    The weights that are trained have no copy; their layers are gathered once more.
    """
    teacher, b = case.teacher, case.dtype.itemsize
    if teacher is None:
        return []
    tokens, read = (case.pack_tokens, "tokens"), (case.teacher_tokens, "tokens")
    head = (teacher.head_parameters, "head parameters")
    two_layers = 2 * teacher.layer_parameters + teacher.root_parameters
    inner = (3 * b * (teacher.inner + teacher.hidden), "B")
    terms = [
        *_teacher_weights(case),
        product("teacher's hidden states", ("head",), [(b, "B"), tokens, (teacher.hidden, "H")]),
        product("a layer of the teacher", ("teacher",), [read, inner], remedy=shorter_packs(case)),
    ]
    if case.masked:
        mask = [(1 + b, "B"), read, read]
        terms.append(product("teacher's mask", ("teacher",), mask, remedy=shorter_packs(case)))
    itself = case.teaches_itself or case.averaged
    if not case.sharded and itself and b < case.weight_bytes:
        copy = [(b, "B"), (case.policy.head_parameters, "head parameters")]
        terms.append(product("teacher's head in bfloat16", ("head",), copy, remedy=LARGER))
    copied = case.copied or case.averaged
    if case.teacher_weights == "full" or not (copied or case.sharded):
        return terms
    gathered = [(b, "B"), (two_layers, "parameters: two layers, embedding, head")]
    terms.append(product("teacher's layers, gathered", ("teacher",), gathered, remedy=LARGER))
    if copied:  # else its head is the policy's
        gathered = [(b, "B"), head]
        terms.append(product("teacher's head, gathered", ("head",), gathered, remedy=LARGER))
    return terms


def _teacher_weights(case: Case) -> list[Term]:
    """Lists the weights of teachers: of the largest one, the others, and an average of the
    policy's, which is float32."""
    if case.teacher_weights == "cpu":
        return []
    over, remedy = (1, ""), "--model.offload-teacher"
    if case.teacher_weights == "sharded":
        over, remedy = (case.placement.gpus, "GPUs"), f"{MORE_GPUS}, or --model.offload-teacher"
    sizes: dict[str, tuple[int, int]] = {}
    if case.copied:
        sizes["teacher"] = (case.dtype.itemsize, case.copied[0].parameters)
    if case.averaged:
        sizes["average of the policy" if sizes else "teacher"] = (4, case.policy.parameters)
    terms = [
        product(name, ALWAYS, [(size, "B"), (count, "parameters")], over, remedy=remedy)
        for name, (size, count) in sizes.items()
    ]
    if others := case.kept_parameters:
        if case.teacher_weights == "full":
            still = case.reference is None and case.run.model.self_teacher == "frozen"
            remedy = "--model.move-teachers" if still else ""
        size = [(case.dtype.itemsize, "B"), (others, "parameters")]
        terms.append(product("the other teachers", ALWAYS, size, over, remedy=remedy))
    return terms


def served_head_terms(case: Case) -> list[Term]:
    """Lists what teachers behind a URL take here: their heads, and the states of a pack; on a CPU
    those of a whole step, which wait in its memory."""
    b, run, terms = (case.dtype.itemsize, "B"), case.run, []
    for shape in case.served:
        size = [b, (shape.vocabulary, "V"), (shape.hidden, "H")]
        remedy = "method.kd topk_rkl, which needs no head"
        terms.append(product("head of a served teacher", ALWAYS, size, remedy=remedy))
    widest = max((shape.hidden for shape in case.served), default=0)
    if widest and case.teacher is None:
        states = [b, (case.pack_tokens, "tokens"), (widest, "H")]
        terms.append(product("teacher's hidden states", ("head",), states))
    if widest and case.placement.cpu:
        tokens = (case.rollouts * run.sampling.max_new_tokens, "tokens")
        terms.append(
            product("states from a server", ("teacher", *UPDATE), [b, tokens, (widest, "H")])
        )
    return terms
