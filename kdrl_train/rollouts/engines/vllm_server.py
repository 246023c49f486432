"""Samples on a vLLM server: completions come over HTTP, weights go through a file both can see.

Every push of weights has a label of its own, which the server's workers keep. A server that was
restarted has none, and gets the weights again from the file; one that another run has pushed to has
another label, and stops the run.
"""

import os
import reprlib
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.copies import host_copies
from kdrl_train.errors import EngineError, RunError
from kdrl_train.exchange import BadReplyError, member, only
from kdrl_train.model.folder import base_of
from kdrl_train.model.fsdp import full_weights
from kdrl_train.model.policy import Policy
from kdrl_train.model.teacher.replies import MOST
from kdrl_train.ranks import World
from kdrl_train.rollouts.engines.requests import (
    CompletionReply,
    CompletionRequest,
    RequestEngine,
    no_poll,
)
from kdrl_train.rollouts.engines.vllm_client import VllmClient
from kdrl_train.runfolder.signals import Stopped
from kdrl_train.waiting import Poll, pause, retry_waits

WEIGHTS = "engine_weights.safetensors"
"""Name of the file in the run's folder; it stays until the next push, for a server that restarts,
and is removed when the run ends."""
FAILED = "a push that failed"
"""The label of a worker whose last push failed, see rollouts/vllm_worker.py."""
LOADING, AGAIN = ", loading ", ", again "
"""What follows the label of a push that was made again, while it is made and then."""
RETRIES = 4
"""New tries to drop the prefix cache; they wait up to 3.75 s in all."""
LONG_RETRIES = 60
"""The same where other ranks may sample: up to 15 minutes."""
RANK_WAIT_S = 5.0
"""Seconds that a rank leaves to each one before it to push to a server that was restarted."""
RESTARTS = 3
"""Restarts of the server while it samples one batch after which the run stops."""


def inspect(server: VllmClient, config: TrainConfig) -> tuple[str, int]:
    """Return the server's name for its model, and its window in tokens.

    Raises: ValueError unless the server replies, and was started as the run needs it.
    """
    required = {"dtype": config.model.dtype, "logprobs_mode": "processed_logprobs"}
    try:
        model = only(server.send("GET", "/v1/models"), "data")
        for state in server.workers("kdrl_state"):
            if {key: member(state, key, str) for key in required} != required:
                raise EngineError(f"{reprlib.repr(state)} where {required} is needed")
        window = member(model, "max_model_len", int)
        if not 0 < window < MOST:
            raise BadReplyError(f"a window of {window} tokens")
        return member(model, "id", str), window
    except (EngineError, BadReplyError) as error:
        raise ValueError(
            f"engine.url must be a vLLM server for this run, got {error}: start it with "
            "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --host 127.0.0.1 "
            f"--model {base_of(config.model.policy)} --dtype {config.model.dtype} --logprobs-mode "
            "processed_logprobs --worker-extension-cls kdrl_train.rollouts.vllm_worker.Worker"
        ) from error


def connect(config: TrainConfig) -> VllmClient:
    """Make a client of engine.url. Raises: ValueError for a URL that cannot be used."""
    try:
        return VllmClient(str(config.engine.url), config.engine.timeout_s)
    except EngineError as error:
        raise ValueError(str(error)) from error


class VllmServerEngine(RequestEngine):
    """An Engine whose model is at engine.url; all ranks send requests, rank 0 pushes weights.

    Raises: ValueError unless the server replies, and was started as the run needs it.
    """

    def __init__(self, config: TrainConfig, policy: Policy, tokenizer: Any, world: World) -> None:
        super().__init__(policy, tokenizer)
        self.server = connect(config)
        self.config = config
        self.poll: Poll = no_poll
        """Called regularly during a push; an exception that it raises stops the push."""
        self.dtype = policy.compute_dtype
        self.file = config.out.absolute() / WEIGHTS
        self.world = world
        self.label: str | None = None
        self.failure: RunError | None = None
        try:
            self.model, self.window = inspect(self.server, config)
        except ValueError:
            self.server.close()
            raise

    def close(self) -> None:
        """Close the connections, and remove the file of the weights."""
        self.server.close()
        if self.world.main:
            with suppress(OSError):  # a file that stays costs space and nothing else
                self.file.unlink()

    def replies(
        self,
        requests: list[CompletionRequest],
        sampling: SamplingConfig,
        poll: Poll,
        report: Callable[[int, int], None],
    ) -> list[CompletionReply]:
        """Return replies as RequestEngine says; at most sampling.batch_size are open at a time.

        Raises: EngineError where the server fails, has other weights or too short a window, and
            where the last push of weights failed.
        """
        if self.failure is not None:
            raise self.failure
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest + sampling.max_new_tokens > self.window:
            raise EngineError(
                f"the server at {self.server.url} must hold the longest prompt and completion, "
                f"got a window of {self.window} tokens for {longest} + {sampling.max_new_tokens}: "
                "start it with a larger --max-model-len"
            )
        for _ in range(RESTARTS):
            label = self._restore(poll)
            replies = self.server.complete(self.model, requests, sampling.batch_size, poll, report)
            if self._labels(poll) == {label}:  # no restart in between
                return replies
        raise EngineError(
            f"the server at {self.server.url} must keep the weights of this run while it samples, "
            f"got {RESTARTS} restarts in one batch: see its log, and continue with --resume"
        )

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        """Load weights as Engine says.

        An error of the push is raised by the next `generate`, so that the step that is done can
        still be saved.
        """

        def push() -> str | None:
            try:
                return self._push(weights, version)
            except Stopped:
                return None

        whole = full_weights(policy.model)
        weights = dict(host_copies(whole, self.dtype)) if self.world.main else {}
        for _ in whole:  # other ranks keep none, but take part where weights are gathered
            pass
        self.failure = None
        try:
            self.label = self.world.on_main(push)
            if self.label is None:
                raise Stopped
        except RunError as error:
            self.failure = error
        self.version = version

    def _push(self, weights: dict[str, Tensor], version: int) -> str:
        """Write the weights, have the server load them, and return the label of this push."""
        label = f"{version} steps, {uuid4().hex}"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.unlink(missing_ok=True)  # another user's link, or the weights before
            self.file.touch(mode=0o600, exist_ok=False)  # safetensors before 0.8 keeps the mode
            save_file(weights, self.file)
            with self.file.open("rb") as written:
                os.fsync(written.fileno())  # the server may be on another machine
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the weights for the server must be written to {self.file}, got {error}: set "
                "`out` to a folder that can be written, with enough space"
            ) from error
        self._load(label, self.poll)
        self._drop_cache(RETRIES, self.poll)
        return label

    def _load(self, label: str, poll: Poll) -> None:
        """Have the server's workers load the file."""
        self.server.workers("kdrl_load", str(self.file), label, poll=poll, patient=True)

    def _drop_cache(self, retries: int, poll: Poll) -> None:
        """Have the server forget the keys and values of other weights."""
        path = "/reset_prefix_cache"
        # a request that has just ended may still hold its keys and values
        for wait_s in (0.0, *islice(retry_waits(), retries)):
            pause(wait_s, poll)
            reply = self.server.send("POST", path, poll=poll, patient=True)
            try:
                if member(reply, "success", bool):
                    return
            except BadReplyError as error:
                raise self.server.wrong(path, error) from error
        raise EngineError(
            f"the server at {self.server.url} must drop its prefix cache after a push, got a "
            "refusal: it has requests of another client, and must serve this run alone"
        )

    def _labels(self, poll: Poll) -> set[str | None]:
        """Return the labels of the weights that the server's workers have."""
        states = self.server.workers("kdrl_state", poll=poll, patient=True)
        try:
            return {member(state, "label", str, type(None)) for state in states}
        except BadReplyError as error:
            raise self.server.wrong("/collective_rpc", error) from error

    def _restore(self, poll: Poll) -> str | None:
        """Push the last weights again where the server was restarted; return its label then.

        Rank 0 does it, or another one where rank 0 needs the server no more.

        Raises: EngineError where the server has weights of another run, and past engine.timeout_s.
        """
        start, ours = time.monotonic(), str(self.label)
        while True:
            labels = self._labels(poll)
            first = next(iter(labels))
            if labels == {self.label} or (
                labels == {first} and str(first).startswith(ours + AGAIN)
            ):
                return first
            others = [str(x)[:100] for x in labels - {None, FAILED} if not str(x).startswith(ours)]
            silence, timeout_s = time.monotonic() - start, self.server.timeout_s
            if others or silence > timeout_s:
                shown = ", ".join(others) or reprlib.repr(labels)
                remedy = "another run uses it; give each run a server of its own"
                if not others:
                    remedy = (
                        f"no rank pushed them in engine.timeout_s = {timeout_s:g} s; restart it"
                    )
                raise EngineError(
                    f"the server at {self.server.url} must have the weights of this run after "
                    f"{self.version} steps, got {shown}: {remedy}, and continue with --resume"
                )
            loading = all(str(label).startswith(ours + LOADING) for label in labels)
            if not loading and silence >= RANK_WAIT_S * self.world.rank:
                return self._push_again(poll)
            pause(next(iter(retry_waits())), poll)

    def _push_again(self, poll: Poll) -> str:
        """Push the file of the last push to a server that was restarted, say so, and return the
        label, which is new: another rank sees by it that the weights changed while it sampled.

        They are loaded twice: under another label until the prefix cache is dropped, as requests
        that went on trying may have filled it from the weights that the server was started with.
        """
        try:
            self.model, self.window = inspect(self.server, self.config)
        except ValueError as error:
            raise EngineError(f"the server was restarted in another way: {error}") from error
        mark = uuid4().hex
        self._load(f"{self.label}{LOADING}{mark}", poll)
        self._drop_cache(RETRIES if self.world.size == 1 else LONG_RETRIES, poll)
        label = f"{self.label}{AGAIN}{mark}"
        self._load(label, poll)
        self.server.say(
            f"the server at {self.server.url} was restarted: it has got the weights after "
            f"{self.version} steps again"
        )
        return label
