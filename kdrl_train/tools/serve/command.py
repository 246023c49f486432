"""Serves a teacher: it scores token ids for any number of trainers.

    POST /score     {"sequences": [{"ids": [...], "prompt_tokens": 5}, ...], "temperature": 1.0,
                     "vocab_size": null} -> {"logprobs": [[...], ...], "fingerprint": "..."}
    POST /hidden    {"sequences": ...} as above -> safetensors: "0.states" [T, H], ...
    GET  /version   the model and its tokenizer: see version_reply
    GET  /health    {"status": "ready"}, or 503 and {"status": "loading"}

The reply to /score has one log-probability, float32 in nats, for each id after the first
prompt_tokens ids, of softmax(logits[:vocab_size] / temperature). With "topk": K it also has the K
likeliest ids and their log-probabilities, and with "extra_tokens": [...] in each sequence, K ids
for each of its T tokens in a row, theirs. It is then in the format of safetensors: of sequence 0
"0.logprobs" [T], "0.topk_ids" [T, K] int32 (-1: there is none), "0.topk_logprobs" [T, K] and
"0.extra_logprobs" [T, K].

The reply to /hidden holds what the head reads to predict these ids: the last hidden states, after
the final norm, in the model's dtype (bfloat16, or float32 where it is served in float32, so that a
float32 run loses nothing). With the head of the model's files and what /version says,
logits = softcap(logit_scale · states · headᵀ). Each reply holds the fingerprint of /version, as
metadata in the format of safetensors. Status 422 means that the request
is wrong; its message names the first field that is. Status 413 means that it is too large, and 401
that it lacks the token of KDRL_SERVE_TOKEN, as `Authorization: Bearer TOKEN`. Status 503 means that
the model is still loading, or that too many sequences or connections wait.
"""

import contextlib
import hashlib
import importlib
import ipaddress
import json
import os
import threading
from dataclasses import asdict, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kdrl_train import output
from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.model.load import load_model, load_tokenizer
from kdrl_train.model.policy import Teacher
from kdrl_train.model.probe import probe
from kdrl_train.model.teacher.client import TeacherInfo
from kdrl_train.model.teacher.identity import describe
from kdrl_train.settings import Port, PositiveInt, settings
from kdrl_train.start.load import described
from kdrl_train.tools.serve.scorer import Scorer, ServedTeacher

PACKAGES = ("kdrl-kernels", "torch", "transformers")
UNSAID = ("fingerprint", "root", "files", "probe_ids", "probe_logprobs")
"""What TeacherInfo knows of other servers, and the hash of what is said."""
TOKEN = "KDRL_SERVE_TOKEN"
"""Environment variable with what every request but /health must bring."""


@settings
class ServeConfig:
    """A teacher's server: `python -m kdrl_train serve`."""

    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own (0.0.0.0: all) needs KDRL_SERVE_TOKEN, a
    secret, in the environment. A trainer has the same in KDRL_TEACHER_TOKEN."""
    port: Port = 8765
    """TCP port."""
    batch_tokens: PositiveInt = 8192
    """Tokens scored in one forward pass. They may come from several clients; 1024 to 2048 suit a
    CPU. A longer sequence gets a pass of its own."""
    queue_size: PositiveInt = 4096
    """Sequences that may wait. Further ones are refused (503), and the client sends them again."""
    request_tokens: PositiveInt = 2**20
    """Most tokens of one request. A larger one is refused (413)."""
    reply_bytes: PositiveInt = 2**29
    """Most bytes of hidden states, or of the likeliest tokens, in one reply. A request for more is
    refused (413); eight such replies may be in memory at a time."""
    connections: PositiveInt = 1024
    """Most connections. Beyond them the one that has been idle for longest is closed."""
    ssl_certfile: Path | None = None
    """Certificate in PEM, to speak https."""
    ssl_keyfile: Path | None = None
    """Its key, if the certificate's file does not hold it."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError(
                f"ssl_certfile must be set with ssl_keyfile, got none for {self.ssl_keyfile}"
            )

    @property
    def url(self) -> str:
        """Says where the server is."""
        return f"http{'s' if self.ssl_certfile else ''}://{self.host}:{self.port}"


def of_run(run: TrainConfig, _folder: Path) -> ServeConfig:
    """Takes over the teacher of a run."""
    alone: dict[str, Any] = {"weights": None, "teachers": {}, "move_teachers": False}
    model = replace(run.model, offload_policy=False, offload_teacher=False, **alone)
    return ServeConfig(model=model)


def main(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT. While the model loads, the server replies "loading".

    Raises: ValueError if the model cannot be loaded, or fastapi or uvicorn is not installed;
        SystemExit if the address is in use.
    """
    teacher = (config.model.teacher or "").strip()
    if not teacher or config.model.teacher_is_url or config.model.teacher_is_self:
        raise ValueError(
            "model.teacher must name a folder or hub id to serve, got "
            f"{teacher or 'nothing'}: set --model.teacher"
        )
    for key in ("weights", "offload_policy", "offload_teacher", "teachers", "move_teachers"):
        if getattr(config.model, key):
            raise ValueError(
                f"model.{key} must not be set to serve, got {getattr(config.model, key)}: "
                "the teacher is loaded from its folder, whole, on one device; a trained policy is "
                "in model/ of its run folder"
            )
    try:
        for package in ("uvicorn", "fastapi"):
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serve must have fastapi and uvicorn, got {error}: pip install 'kdrl-kernels[serve]'"
        ) from error
    app = importlib.import_module("kdrl_train.tools.serve.app")
    listen = importlib.import_module("kdrl_train.tools.serve.listen")
    served, failures = ServedTeacher(), []
    server = listen.server(
        app.make(served, config.request_tokens, read_token(config.host), config.reply_bytes),
        config.host,
        config.port,
        config.connections,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )

    def load_in_thread() -> None:
        try:
            load(config, served)
        except Exception as error:  # the main thread raises it below
            failures.append(error)
            server.should_exit = True

    threading.Thread(target=load_in_thread, name="loader", daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has already shut down
        server.run()
    if failures:
        raise failures[0]


def read_token(host: str) -> str | None:
    """Reads the token that requests must bring from the environment; None: there is none.

    Raises: ValueError for one that no header can hold, and where a host needs one.
    """
    token = os.environ.get(TOKEN)
    if token is None:
        if not _is_own(host):
            raise ValueError(
                f"{TOKEN} must be set to listen at {host or 'every address'}, got none: everyone "
                "who reaches it could use the model. Set it to a secret, and KDRL_TEACHER_TOKEN of "
                "the trainers to the same; or listen at 127.0.0.1"
            )
    elif not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError(
            f"{TOKEN} must be a word of printable ASCII characters, got {len(token)} others: make "
            "one with `openssl rand -hex 32`"
        )
    return token


def _is_own(host: str) -> bool:
    """Says whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load(config: ServeConfig, served: ServedTeacher) -> None:
    """Loads the model, and prints its address.

    A model that does not keep the sequences of a pack apart scores one sequence at a time.
    """
    dtype = getattr(torch, config.model.dtype)
    folder = str(config.model.teacher)
    console = output.guarded_console()
    output.begin(f"loading {described(folder)}", at_once=True)
    model = Teacher(load_model(folder, "model.teacher", config.model, dtype), compute_dtype=dtype)
    batch_tokens = config.batch_tokens
    try:
        probe(model, "model.teacher")
    except ValueError as error:
        probe(model, "model.teacher", packed=False)
        console.print(f"one sequence in each forward pass: {error}", soft_wrap=True)
        batch_tokens = 1
    if model.choice.reason:
        console.print(str(model.choice), soft_wrap=True)
    output.begin(f"hashing {described(folder)}", at_once=True)
    tokenizer = load_tokenizer(folder, "model.teacher", config.model.trust_remote_code)
    info = version_reply(describe(folder, model, tokenizer), tokenizer.chat_template)
    served.info = info
    served.scorer = Scorer(model, batch_tokens, config.queue_size)
    output.begin("")  # it waits for requests
    console.print(f"{folder} at {config.url}", soft_wrap=True)


def version_reply(teacher: TeacherInfo, chat_template: Any) -> dict[str, Any]:
    """Makes the reply to /version.

    It holds what TeacherInfo explains of such a server; the fingerprint, a hash of all that but
    the model's name, which each reply to /score repeats; chat_template: that of the tokenizer, or
    null; packages: their versions.
    """
    info = {key: value for key, value in asdict(teacher).items() if key not in UNSAID}
    said = json.dumps({key: value for key, value in info.items() if key != "model"}, sort_keys=True)
    return info | {
        "fingerprint": hashlib.sha256(said.encode()).hexdigest(),
        "chat_template": chat_template,
        "packages": {n: _version(n) for n in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # it runs from its sources
        return None
