"""The probe of a teacher reads what the teacher reads during the run."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from kdrl_train.config import TrainConfig
from kdrl_train.model.policy import Teacher
from kdrl_train.model.teacher.client import Query, TeacherClient
from kdrl_train.start import models
from kdrl_train.start.load import Loaded
from kdrl_train.start.teacher_server import check_scores

TEMPLATE = "{answer}, so {prompt}"


@pytest.mark.parametrize(("template", "first"), [(None, "0+0="), (TEMPLATE, "0, so 0+0=")])
def test_a_probe_reads_the_teachers_prompts(
    settings: TrainConfig, loaded: Loaded, template: str | None, first: str
) -> None:
    config = replace(settings, data=replace(settings.data, teacher_template=template))
    read: list[torch.Tensor] = []
    teacher, tokenizer = loaded.teacher_models[0], loaded.tokenizer
    assert isinstance(teacher, Teacher)
    hook = teacher.model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"][0]), with_kwargs=True
    )
    said = models.check_teacher_reads(config, loaded, teacher)
    hook.remove()
    assert tokenizer.decode(read[0]) == first
    total, count = 0.0, 0
    for ids in read:
        logprobs = teacher.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        total += logprobs.gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    assert said.startswith(f"{total / count:.2f} nats per prompt token")

    queries: list[Query] = []

    def logprobs(query: Query) -> torch.Tensor:
        queries.append(query)
        return torch.zeros(len(query.completion_ids))

    client = cast(TeacherClient, SimpleNamespace(vocab_size=258, logprobs=logprobs))
    check_scores(config, client, tokenizer, loaded.examples[:2])
    (query, _) = queries
    assert tokenizer.decode([*query.prompt_ids, *query.completion_ids]) == first
