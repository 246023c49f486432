"""What the tests of engines on a vLLM server share."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from pebble.common import CONSTS

from kdrl_train import waiting
from kdrl_train.config import TrainConfig
from kdrl_train.model.load import load_policy, load_tokenizer
from kdrl_train.model.policy import Policy
from kdrl_train.ranks import ALONE
from kdrl_train.rollouts.engines import open_engine


@pytest.fixture(autouse=True)
def _as_users_see_pebble(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let verifiers end what is late at pebble's own pace."""
    monkeypatch.setattr(CONSTS, "sleep_unit", type(CONSTS).sleep_unit)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a scripted vLLM server, which a test then runs."""
    from tests.train.rollouts.scripted_vllm import Scripted  # noqa: PLC0415  it needs fastapi

    monkeypatch.setattr(waiting, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(waiting, "LONGEST_WAIT_S", 0.01)
    return Scripted()


@pytest.fixture
def opened(server: Any, config: Callable[..., TrainConfig]) -> Iterator[tuple[Any, Policy]]:
    """Open the engine of a run and push its weights; yields it and the policy."""
    from tests.train.rollouts.scripted_vllm import at  # noqa: PLC0415
    from tests.train.servers import running  # noqa: PLC0415

    with running(server.app()) as url:
        settings = at(config, url)
        policy = load_policy(settings, None)
        engine = open_engine(settings, policy, load_tokenizer(settings.model.policy), ALONE)
        with closing(engine):
            engine.load(policy, 3)
            yield engine, policy
