"""verl's FSDP engine makes an update with our head and losses: `bash tests/verl.sh`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: bash tests/verl.sh")

from tests.integrations import verl_host as host

pytestmark = [
    pytest.mark.verl,
    # verl, ray and peft under the versions that verl asks for
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Qwen2 on disk, and a process group for the engines."""
    folder = tmp_path_factory.mktemp("verl")
    with host.one_process(folder):
        yield host.saved(folder)


@pytest.fixture(scope="module")
def lean(model: Path) -> Any:
    return host.engine(model, "kdrl")


@pytest.fixture(scope="module")
def full(model: Path) -> Any:
    return host.engine(model, None)


@pytest.mark.parametrize("mode", ["vanilla", "kdrl", "gspo"])
def test_an_update_has_the_gradients_of_full_logits(lean: Any, full: Any, mode: str) -> None:
    batch = host.rollouts()
    loss = host.policy_gradient(host.actor_config(loss_mode=mode, entropy_coeff=0.1))
    ours = host.gradients(lean, host.update_batch(batch, fused=True), loss)
    theirs = host.gradients(full, host.update_batch(batch, fused=False), loss)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert max(grad.abs().max() for grad in theirs[1].values()) > 1e-2
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)


def test_padded_inputs_have_them_too(model: Path, full: Any) -> None:
    batch = host.rollouts()
    padded = host.engine(model, "kdrl", use_remove_padding=False)
    loss = host.policy_gradient(host.actor_config())
    data = host.update_batch(batch, fused=True, use_remove_padding=False)
    ours = host.gradients(padded, data, loss)
    theirs = host.gradients(full, host.update_batch(batch, fused=False), loss)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
