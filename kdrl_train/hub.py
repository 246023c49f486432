"""Sees once whether the hub replies, and lets its clients do without it where it does not.

They would try again for half a minute for each file that their caches lack.
"""

import importlib
import os
import sys
from concurrent.futures import Future
from functools import cache
from threading import Thread

DEADLINE_S = 10.0
"""Longest wait for the hub's first reply. A name with eight addresses may take as many timeouts."""


@cache
def unreachable() -> str:
    """Say why the hub cannot be reached; nothing where it replies.

    From then on its clients, also those of processes that this one starts, read their caches alone.
    """
    client = importlib.import_module("huggingface_hub")  # here, as not every process needs it
    if client.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    done: Future[None] = Future()

    def connect() -> None:
        try:
            client.utils.get_session().head(client.constants.ENDPOINT, timeout=DEADLINE_S)
            done.set_result(None)
        except Exception as error:  # each version of the client has its own
            done.set_exception(error)

    Thread(target=connect, name="hub", daemon=True).start()  # an end does not wait for it
    try:
        done.result(DEADLINE_S)
    except Exception as error:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that begin later
        client.constants.HF_HUB_OFFLINE = True
        if (datasets := sys.modules.get("datasets")) is not None:  # it has read the variable
            datasets.config.HF_HUB_OFFLINE = True
        said = " ".join(str(error).split()) or f"no reply within {DEADLINE_S:g} s"
        return f"{client.constants.ENDPOINT}: {type(error).__name__}: {said}"
    return ""
