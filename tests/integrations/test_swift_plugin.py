"""What the plugin changes in ms-swift, and what it leaves alone."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the host and what it imports, at their import
    pytest.importorskip("swift.rlhf_trainers.grpo_trainer")

from swift.arguments import RLHFArguments
from swift.trainers import TrainerFactory
from swift.utils import import_external_file

from kdrl_kernels.integrations.swift import PLUGIN
from tests.integrations.swift_runs import OFFLINE, arguments, assert_equal, pristine, read, train

pytestmark = [pytest.mark.swift, pytest.mark.filterwarnings("ignore")]  # the host's own warnings

LIGER = {"use_liger_kernel": "true"}


@pytest.fixture
def no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the model's layers as they are, since Liger's need a GPU."""
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *_: None)


@pytest.fixture
def installed() -> Iterator[None]:
    """The plugin, loaded as ms-swift loads it."""
    with pristine():
        import_external_file(PLUGIN)
        yield


@pytest.mark.usefixtures("installed")
def test_two_trainers_change_and_no_folder_stays_on_the_path() -> None:
    names = {name: TrainerFactory.TRAINER_MAPPING[name] for name in ("grpo", "gkd", "dpo")}
    assert names == {
        "grpo": "kdrl_kernels.integrations.swift.grpo.SwiftGRPOTrainer",
        "gkd": "kdrl_kernels.integrations.swift.gkd.SwiftGKDTrainer",
        "dpo": "swift.rlhf_trainers.DPOTrainer",
    }
    assert str(Path(PLUGIN).parent) not in sys.path
    checks = [RLHFArguments._check_teacher, RLHFArguments._check_grpo]
    import_external_file(PLUGIN)
    assert checks == [RLHFArguments._check_teacher, RLHFArguments._check_grpo]


def test_another_version_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "plugin.py").write_text(Path(PLUGIN).read_text(encoding="utf-8"))
    monkeypatch.delitem(sys.modules, "kdrl_kernels.integrations.swift")
    monkeypatch.setattr("kdrl_kernels.integrations.versions.version", lambda _: "4.7.0")
    with pristine(), pytest.raises(ImportError, match=r"of release 4\.6, got 4\.7\.0"):
        import_external_file(str(tmp_path / "plugin.py"))


def test_the_host_refuses_a_teacher_beside_liger(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OPD-RL is not supported with use_liger_kernel"):
        train(tmp_path, "grpo", teacher_model="teacher", **LIGER)


@pytest.mark.usefixtures("no_layers")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("grpo", {"teacher_model": "teacher", "log_entropy": "true", "delta": "1.5"}),
        ("gkd", {"gkd_logits_topk": "5", "sft_alpha": "0.5"}),
        ("gkd", {"teacher_model": None, "dataset": "privileged.jsonl"}),
    ],
)
def test_liger_layers_beside_what_liger_loss_lacks(
    kind: str, options: dict[str, str | None], tmp_path: Path
) -> None:
    host = train(tmp_path / "host", kind, **options)
    ours = train(tmp_path / "ours", kind, plugin="yes", **options, **LIGER)
    assert_equal(ours, host)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gkd", {"gkd_logits_topk": "513"}, "gkd_logits_topk must be at most 512"),
        ("grpo", {"loss_type": "fipo", "teacher_model": "teacher"}, "does not support loss_type"),
    ],
)
def test_what_cannot_be_is_refused(
    kind: str, options: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, kind, plugin="yes", **options)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_line(processes: int, tmp_path: Path) -> None:
    """`swift rlhf` with --external_plugins, alone and with DDP over gloo."""
    options: dict[str, str | None] = {"teacher_model": "teacher", "num_iterations": "2"}
    environment = {**os.environ, **OFFLINE}
    if processes > 1:
        options |= {"use_cpu": "true", "ddp_backend": "gloo", "per_device_train_batch_size": "2"}
        environment |= {"ACCELERATE_USE_CPU": "true", "NPROC_PER_NODE": str(processes)}
    runs = []
    for plugin in ("yes", None):
        output = tmp_path / f"{plugin}"
        command = [str(Path(sys.executable).with_name("swift")), "rlhf"]
        command += arguments(output, "grpo", plugin=plugin, **options)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("kdrl_kernels.linear_logprobs" in done.stdout + done.stderr) == (plugin == "yes")
        runs.append(read(output))
    assert_equal(*runs)
    kl = runs[0].log[0]["teacher_kl"]
    assert kl > 0.1
