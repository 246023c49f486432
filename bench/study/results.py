"""Writes and reads results.json: the runs that ended, and the machine, versions and settings."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.study.config import StudyConfig, Trial
from bench.study.trial import TrialResult
from kdrl_train.config_file import to_dict
from kdrl_train.runfolder import events

SWEEP_CURVES = ("accuracy",)
"""Metrics whose curves are kept for the runs of a sweep."""


def save(config: StudyConfig, results_by_trial: Mapping[Trial, TrialResult]) -> dict[str, Any]:
    """Write results.json into the study's folder and return its content.

    The content's "trials" are TrialResult objects here, dictionaries in the file.
    """
    results = [
        replace(r, curve={k: r.curve[k] for k in SWEEP_CURVES if k in r.curve}) if t.sweep else r
        for t, r in results_by_trial.items()
    ]
    about = {"machine": machine(), "config": {**to_dict(config), "out": None}}
    text = json.dumps(about | {"trials": [asdict(result) for result in results]})
    partial = config.out / "results.json.partial"
    partial.write_text(text.replace('{"trial"', '\n{"trial"') + "\n", encoding="utf-8")
    partial.replace(config.out / "results.json")
    return about | {"trials": results}


def load(path: Path) -> dict[str, Any]:
    """Read from a file what `save` returned."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return values | {"trials": [TrialResult.from_dict(one) for one in values["trials"]]}


def machine() -> dict[str, Any]:
    """Describe the machine, and the versions of the libraries."""
    return {"cores": os.cpu_count(), "processor": _processor(), **events.versions()}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
