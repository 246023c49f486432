"""Which of several teachers' servers are queried while the rewards are computed."""

from types import SimpleNamespace
from typing import Any

from kdrl_train.method.config import MethodConfig, ScheduleConfig, TeacherMethod
from kdrl_train.method.schedules import History
from kdrl_train.model.teachers import Teachers
from kdrl_train.ranks import ALONE
from kdrl_train.step.collect import early_servers

BUDGET = ScheduleConfig(kind="kl_budget", initial=0.1)
OTHERS = {
    "masked": TeacherMethod(kd_mask="wrong"),
    "weightless": TeacherMethod(kd_weight=0.0),
    "adaptive": TeacherMethod(kd_coef=ScheduleConfig(kind="reward_adaptive")),
    "budget": TeacherMethod(kd_coef=BUDGET),
    "off": TeacherMethod(kd_coef=ScheduleConfig(initial=0.0, final=0.0)),
    "plain": TeacherMethod(),
    "here": TeacherMethod(),
}


def early(method: MethodConfig, history: History, step: int) -> set[str]:
    names = ("default", *OTHERS)
    remote: Any = {i: None for i, name in enumerate(names) if name != "here"}
    teachers = Teachers(names, remote=remote, several=True)
    config = SimpleNamespace(method=method)
    run: Any = SimpleNamespace(teachers=teachers, config=config, history=history, world=ALONE)
    return {names[number] for number in early_servers(run, step)}


def test_a_server_is_queried_early_where_each_completion_is_distilled() -> None:
    method = MethodConfig(teachers=OTHERS)
    assert early(method, History(), 0) == {"default", "budget", "plain"}
    # the step before is not in the log yet, where the next one is drawn beside it
    assert early(method, History(), 1) == {"default", "plain"}
    of_teachers = {f"kl_teacher/{name}": 0.1 for name in ("default", "budget")}
    history = History()
    history.add({"step": 0, "kl_teacher": 0.1} | of_teachers)
    assert early(method, history, 1) == {"default", "budget", "plain"}
