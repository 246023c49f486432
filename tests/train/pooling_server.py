"""Replies as vLLM 0.32 does with --runner pooling and the task token_embed; a model of transformers
computes."""

from pathlib import Path
from typing import Any, Literal

import fastapi
import torch
from fastapi.responses import JSONResponse, Response
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class PoolingServer:
    """Gives the states of a model; `sent` keeps the requests.

    states: after the final norm, as for nearly every family; before it, as for those whose norm
        vLLM counts to the head; or scaled whatever the request says, as older versions do.
    """

    def __init__(
        self, folder: Path, states: Literal["after", "before", "scaled"] = "after"
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.kind = states
        self.root: Any = str(folder)
        self.sent: list[dict[str, Any]] = []
        self.before: list[Tensor] = []
        self.model.get_decoder().norm.register_forward_pre_hook(
            lambda _module, args: self.before.append(args[0])
        )

    def app(self) -> fastapi.FastAPI:
        app = fastapi.FastAPI()
        app.get("/v1/models")(self.models)
        app.post("/pooling")(self.pool)
        app.post("/detokenize")(self.detokenize)
        return app

    def detokenize(self, body: dict[str, Any]) -> Any:
        return {"prompt": self.tokenizer.decode(body["tokens"])}

    def models(self) -> Any:
        model = {"id": "served", "root": self.root, "max_model_len": 255}
        return JSONResponse({"object": "list", "data": [model]})

    @torch.no_grad()
    def pool(self, body: dict[str, Any]) -> Response:
        assert body["task"] == "token_embed"
        assert body["encoding_format"] == "bytes"
        assert body["endianness"] == "little"
        self.sent.append(body)
        self.before.clear()
        after = self.model.get_decoder()(input_ids=torch.tensor([body["input"]])).last_hidden_state
        states = (self.before[0] if self.kind == "before" else after)[0]
        if self.kind == "scaled" or body.get("use_activation", True):
            states = states / states.norm(dim=1, keepdim=True)
        numbers = states.to(getattr(torch, body.get("embed_dtype", "float32")))
        data = bytes(numbers.contiguous().view(torch.uint8).flatten().tolist())
        return Response(data, media_type="application/octet-stream")
