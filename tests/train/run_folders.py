"""Writes invented run folders for tests of the report; nothing is trained."""

import json
import math
from pathlib import Path
from typing import Any

from kdrl_train.config import ModelConfig, SamplingConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.runfolder import jsonl

STAGES = ("rollout", "verify", "teacher", "update", "sync")


def record(step: int, seed: int = 0, level: float = 0.0, teacher: bool = True) -> dict[str, Any]:
    """Makes a record of metrics.jsonl; `level` is added to its reward."""
    wave = 0.1 * math.sin(0.7 * step + seed)
    times = {f"seconds_{name}": 0.5 + 0.1 * i for i, name in enumerate(STAGES)}
    known = 0.9 - 0.001 * step if teacher else None
    return {
        "step": step,
        "reward": 0.3 + level + wave,
        "accuracy": 0.3 + level + wave,
        "groups_with_signal": 0.5,
        "rewards_missing": 0.0,
        "tokens": 1000 + step,
        "response_length": 20.0 - wave,
        "response_length_counts": [0, 3, 8, 5, *[0] * 11, 1],
        "truncated": 0.05,
        "verifier_right": 20,
        "verifier_timeout": int(step == 1),
        "entropy": 1.2 - 0.0001 * step,
        "kl_teacher": known,
        "teacher_log_ratio_p10": known and known - 1,
        "teacher_log_ratio_p50": known,
        "teacher_log_ratio_p90": known and known + 1,
        "teacher_log_ratio_counts": [0, 0, 1, 2, 3, 4, 5, 90, 5, 4, 3, 2, 1, 0, 0]
        if teacher
        else None,
        "kd_coef": 0.3 if teacher else None,
        "sampler_mismatch_mean": 1e-7,
        "loss": 0.4 - wave,
        "grad_norm": 1.5 + wave,
        "learning_rate": 1e-3,
        "tokens_per_s": 800.0,
        "seconds": 2.5,
        **times,
        "brand_new_number": float(step),
    }


def sample(step: int, **more: Any) -> dict[str, Any]:
    """Makes a line of samples/."""
    return {
        "step": step,
        "id": "p1",
        "prompt": "1+2=?",
        "completion": "1+2=3 ü",
        "answer": "3",
        "reward": 1.0,
        "outcome": "right",
        "tokens": 6,
        "truncated": False,
        "advantage": 0.6,
        "kd_weight": 0.3,
        "token_chars": [1, 1, 1, 2, 0, 2],
        "teacher_log_ratio": [0.05, -0.3, 1.0, 3.0, None, -4.0],
        **more,
    }


def run_folder(
    folder: Path,
    records: list[dict[str, Any]],
    *,
    seed: int = 0,
    samples: dict[int, list[dict[str, Any]]] | None = None,
    events: list[dict[str, Any]] | None = None,
    **config: Any,
) -> Path:
    """Writes a run folder; config: fields of TrainConfig."""
    folder.mkdir(parents=True)
    settings = {
        "model": ModelConfig(policy="student", teacher="teacher"),
        "sampling": SamplingConfig(max_new_tokens=48),
        "steps": len(records) or 10,
    } | config
    save_yaml(TrainConfig(out=folder, seed=seed, **settings), folder / "config.yaml")
    text = "".join(json.dumps(one) + "\n" for one in records)  # NaN stays, as in a foreign file
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if samples:
        (folder / "samples").mkdir()
    for step, lines in (samples or {}).items():
        jsonl.write(folder / "samples" / f"step_{step:06d}.jsonl", lines)
    if events:
        jsonl.write(folder / "events.jsonl", events)
    return folder
