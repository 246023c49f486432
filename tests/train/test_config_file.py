"""config_file, and what must not stand in settings: secrets, and YAML that harms."""

import os
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from kdrl_train.config import DataConfig, TrainConfig
from kdrl_train.config_file import load_yaml, update
from kdrl_train.output import guarded_console
from kdrl_train.rollouts.problems import load_examples
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.events import Events
from kdrl_train.tools.report.page import write as write_page
from tests.train.run_folders import run_folder

SECRET_URLS = (
    "http://me:s3cret@host:1",
    "HTTPS://s3cret@host",
    "http://h:1/v1?key=s3cret",
    "a://h#s3cret",
)


@pytest.mark.fault("secrets")
@pytest.mark.parametrize(
    ("key", "variable"), [("teacher", "KDRL_TEACHER_TOKEN"), ("url", "VLLM_API")]
)
def test_a_secret_in_an_address_is_refused_unseen(
    key: str, variable: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("tried", len(SECRET_URLS))
    section = "model" if key == "teacher" else "engine"
    values: dict[str, object] = {"kind": "vllm_server"} if key == "url" else {}
    for url in SECRET_URLS:
        with pytest.raises(
            ValueError, match=rf"^{section}\.{key} must be .* variable {variable}"
        ) as e:
            update(TrainConfig(), {section: values | {key: url}})
        assert "s3cret" not in str(e.value)
    update(TrainConfig(), {section: values | {key: "http://host:1/v1"}})


@pytest.mark.fault("secrets")
def test_a_secret_in_an_address_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older run's settings may hold one, and errors of libraries name proxies."""
    run = run_folder(tmp_path / "run", [])
    text = (run / "config.yaml").read_text("utf-8")
    for line, shown in {
        "teacher: http://me:s3cret@host:1/v1?a=1&api_key=s3cret": "http://***@host:1/v1?a=1&amp;api_key=***",
        "teacher: 'x http://s3cret@h'": "x http://***@h",
    }.items():
        (run / "config.yaml").write_text(re.sub("teacher: .*", line, text, count=1), "utf-8")
        write_page({"a": [run]}, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text("utf-8")
        assert shown in page
        assert "s3cret" not in page
    error = "no proxy at http://me:s3cret@proxy:3128: mail me@host"
    Events(run).add(0, "failed", error)
    guarded_console().print(error, soft_wrap=True)
    for shown in ((run / "events.jsonl").read_text("utf-8"), capsys.readouterr().out):
        assert "no proxy at http://***@proxy:3128: mail me@host" in shown


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh")
)
WRONG_FILES: dict[str, tuple[str | bytes, str]] = {
    "references": (BOMB, r"\*a refers to another value: write it out .*line 2"),
    "a key twice": ("steps: 1\nsteps: 2\n", "the key steps stands twice .*line 2"),
    "a nested key twice": ("model: {policy: a, 'policy': b}\n", "the key policy stands twice"),
    "brackets": ("[" * 20_000, "maximum recursion depth"),
    "digits": ("steps: " + "9" * 5000, "4300 digits"),
    "no date": ("steps: 2024-99-99", "month must be in"),
    "bytes": (b"\x00\x01\xff", "can't decode byte 0xff"),
    "code": ("a: !!python/object/apply:os.system ['x']", "could not determine a constructor"),
    "a list as a key": ("? [a]\n: 1\n", "unhashable key"),
    "length": ("a: " + "x" * 1_000_000, "it is larger than 1,000,000 bytes"),
}


@pytest.mark.fault("hostile config or data")
@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_file_of_settings_that_harms_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    content, why = WRONG_FILES[kind]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        ValueError, match=rf"^--config must be a YAML file, got .*: .*{why}"
    ) as error:
        load_yaml(path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="POSIX has pipes among files")
@pytest.mark.fault("hostile config or data")
def test_a_pipe_or_device_is_read_by_nobody(tmp_path: Path) -> None:
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    if sys.platform == "linux":  # a file that cannot be read, by root either
        with pytest.raises(ValueError, match=r"must be a YAML file, got /proc/self/mem: "):
            load_yaml(Path("/proc/self/mem"))
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(ValueError, match="it is a pipe or a device"):
            load_yaml(path)
        with pytest.raises(ValueError, match="must be a file, got a folder, pipe or device"):
            jsonl.read(path)
        with pytest.raises(FileNotFoundError, match=r"data\.path must be an existing"):
            load_examples(DataConfig(path=str(path)))
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"with no .* or \.parquet file"):
        load_examples(DataConfig(path=str(tmp_path)))
