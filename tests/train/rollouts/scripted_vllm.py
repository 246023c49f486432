"""A scripted vLLM server, and a run's engine on it."""

import threading
import time
from collections.abc import Callable
from typing import Any

import fastapi
import torch
from fastapi.responses import JSONResponse
from safetensors.torch import load_file

from kdrl_train.config import EngineConfig, SamplingConfig, TrainConfig
from kdrl_train.rollouts.sampler import SampleRequest
from tests.train.servers import status

Config = Callable[..., TrainConfig]
SAMPLING = SamplingConfig(group_size=2, max_new_tokens=3, temperature=0.8)
PROMPTS = [[5], [20, 21]]
REQUEST = SampleRequest(prompts=PROMPTS, sampling=SAMPLING, seed=1, step=2)


class Scripted:
    """Replies as vLLM does; a test changes `choice` and `state`."""

    def __init__(self) -> None:
        self.state = {"label": None, "dtype": "float32", "logprobs_mode": "processed_logprobs"}
        self.choice: Any = {"token_ids": [9, 0], "logprobs": {"token_logprobs": [-1.0, -2.0]}}
        self.window = 256
        self.dev_mode = True
        self.forgets = 0
        self.slow: list[int] = []
        self.resets = [True]
        self.loads: list[str] = []
        self.hangs = ""
        self.on_hang: Callable[[], Any] = int
        self.release = threading.Event()
        self.busy: Callable[[dict[str, Any]], Any] | None = None
        self.bodies: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}

    def app(self) -> Any:
        app = fastapi.FastAPI()
        models = {"data": [{"id": "policy", "max_model_len": self.window}]}
        app.get("/v1/models")(lambda: JSONResponse(models))
        app.post("/collective_rpc")(self.rpc)
        app.post("/reset_prefix_cache")(self.reset)
        app.post("/v1/completions")(self.answer)
        return app

    def hang(self, path: str) -> None:
        """Keep a request to the path that hangs, and tell the test of the first one."""
        if self.hangs == path:
            tell, self.on_hang = self.on_hang, int
            tell()
            self.release.wait(20)

    def rpc(self, body: dict[str, Any]) -> Any:
        self.hang("/collective_rpc")
        if not self.dev_mode:
            return status(404, "Not Found")
        self.calls.append(body["method"])
        if body["method"] == "kdrl_state":
            return {"results": [self.state]}
        path, self.state["label"] = body["args"]
        self.weights = load_file(path)
        self.loads.append(self.state["label"])
        return {"results": [None]}

    def reset(self) -> Any:
        self.calls.append("reset")
        self.hang("/reset_prefix_cache")
        return {"success": self.resets.pop() if len(self.resets) > 1 else self.resets[0]}

    def answer(self, body: dict[str, Any]) -> Any:
        self.hang("/v1/completions")
        return self.busy(body) if self.busy is not None else self.complete(body)

    def complete(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        if body["prompt"] == self.slow:
            time.sleep(0.5)
        if self.forgets:
            self.forgets -= 1
            self.state["label"] = None
        if isinstance(self.choice, fastapi.Response):
            return self.choice
        return {"choices": [self.choice]}


def at(config: Config, url: str) -> TrainConfig:
    return config(engine=EngineConfig(kind="vllm_server", url=url, timeout_s=5.0))


def choice(ids: list[int], logprobs: list[float]) -> dict[str, Any]:
    return {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
