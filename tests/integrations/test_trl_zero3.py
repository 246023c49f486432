"""KdrlTrainer with an LM head that is whole in its forward alone, as DeepSpeed ZeRO-3 keeps it.

DeepSpeed itself is not run: the tests free the weight, and gather it where TRL does.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

pytest.importorskip("trl")

from trl.trainer import utils

from kdrl_kernels.integrations.trl import fused, head
from tests.integrations.test_trl_patch import Partitioned
from tests.integrations.trl_micro_batches import gradient_of, micro_batch, trainer_in_a_step
from tests.integrations.trl_runs import OLD_NAMES, small_model

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


@pytest.mark.parametrize("kd", ["k2", "rkl"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_the_head_is_gathered_where_it_is_read(
    tmp_path: Path, loss_type: str, kd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer_in_a_step(tmp_path, small_model(2).double(), kd=kd, loss_type=loss_type)
    inputs = micro_batch(run.model)
    exact_loss = run._compute_loss(run.model, inputs)
    exact = gradient_of(run.model, exact_loss)

    shards = Partitioned(run.model.lm_head.weight)

    def gathered(*parts: Any) -> AbstractContextManager:
        return shards.gathered(*parts) if parts[0] is shards.weight else nullcontext()

    for module in (head, utils):
        monkeypatch.setattr(module, "maybe_gather_lm_head_ctx", gathered)
    monkeypatch.setattr(fused, "is_deepspeed_zero3_enabled", lambda: True)
    loss = run._compute_loss(run.model, inputs)
    assert not shards.weight.numel()
    gradient = gradient_of(run.model, loss)
    assert_close(loss, exact_loss, rtol=1e-9, atol=0)
    for name, values in exact.items():
        assert_close(gradient[name], values, rtol=1e-9, atol=1e-12)


def test_a_sketch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="head_backward must be 'exact'") as error:
        trainer_in_a_step(tmp_path, None, kd=None, head_backward="sketch")
    assert "\n" not in str(error.value)
