"""Switches off what a model draws at random while it trains.

The loss is taken at the distribution that is sampled from, which is that of evaluation mode. So
training leaves a model in evaluation mode: dropout modules, dropout called as a function and the
jitter of routers then do nothing, and a number that evaluation reads too stays (PhiMoE's
router_jitter_noise is also a threshold of its router). Only a layer that recomputes its activations
must be in training mode, itself without its parts; its own dropout rates are 0.
"""

import re
from typing import Any

from torch import nn

RATES = re.compile(r"drop(out|path|_path|_rate|_prob)|pdrop|layer_?drop|^drop$")
"""Names of attributes that hold the probability of leaving something out."""
Silenced = tuple[Any, str, float]
"""An object, the name of its attribute that became 0, and the value before."""


def silence(model: Any) -> None:
    """Set every rate of dropout to 0: of nn.Dropout, of other modules and of configurations.

    Also switch off that RWKV changes its weights in place between evaluation and training. What
    the configurations said is kept in model.silenced, for the export.
    """
    configs: list[Any] = []
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)):
            module.p = 0.0
        _zero(module)
        configs.append(getattr(module, "config", None))
    silenced: list[Silenced] = []
    for config in {id(one): one for one in configs if hasattr(one, "to_dict")}.values():
        silenced += _zero(config)
        if getattr(config, "rescale_every", 0):
            silenced.append((config, "rescale_every", config.rescale_every))
            config.rescale_every = 0
    if not hasattr(model, "silenced"):  # a second call finds zeros
        model.silenced = silenced


def _zero(holder: Any) -> list[Silenced]:
    """Set the rates among an object's own attributes to 0; return those that were not."""
    rates = [
        (holder, name, value)
        for name, value in vars(holder).items()
        if isinstance(value, float) and value != 0 and RATES.search(name)
    ]
    for _, name, _ in rates:
        setattr(holder, name, 0.0)
    return rates


def train_quietly(model: nn.Module) -> None:
    """Put a model into evaluation mode, and the layers that recompute activations into training
    mode, where transformers looks for it."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
