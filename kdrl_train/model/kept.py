"""Undoes what the modules of a model keep of a sequence, which would change the next one."""

from torch import nn

from kdrl_train.model import rotary

KEPT = ("conv1d_state", "recurrent_states")
"""Attributes in which RecurrentGemma's layers keep the state of what they generate. They continue
it, and do not begin anew, where the next prompt has one token."""


def forget(model: nn.Module) -> None:
    """Put the modules of a model into the state in which they meet their first sequence."""
    rotary.forget(model)
    for module in model.modules():
        for name in KEPT:
            if vars(module).get(name) is not None:
                setattr(module, name, None)
