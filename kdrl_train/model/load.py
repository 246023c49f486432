"""Loads models and tokenizers from folders or hub ids, onto the run's device."""

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

import kdrl_kernels as kk
from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.config.models import DEFAULT_TEACHER, SELF
from kdrl_train.model import adapter_folder, attention, choice, lora
from kdrl_train.model.folder import (
    auto_class,
    base_of,
    is_adapter,
    one_line,
    quantization,
    read_config,
    refusal,
    require_loadable,
    require_place,
    require_readable,
    stored_file,
    tensors,
)
from kdrl_train.model.fsdp import shard
from kdrl_train.model.liger import patch_layers, require_liger
from kdrl_train.model.policy import CHOICE, Policy, Teacher
from kdrl_train.model.self_teacher import EmaTeacher
from kdrl_train.model.weights import (
    Origin,
    origin_of,
    require_complete,
    require_floats,
    require_trainable,
    without_report,
)
from kdrl_train.ranks import ALONE, World

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
REMEDY = {
    "trained": "gradients reach only weights in 16 or 32 bits: name the model that it was made of, "
    "or dequantise it with transformers and save it",
    "sharded": "cannot be sharded: name the model that it was made of, or serve this one "
    "(python -m kdrl_train serve) and set model.teacher to its URL",
}
"""Why quantised weights cannot be used, and what to do, by what would be done with them."""


def device_of(config: ModelConfig) -> torch.device:
    """Return the run's device; "auto" is cuda where there is one, else cpu.

    Under torchrun each rank uses the GPU whose index is its rank on the machine.

    Raises: ValueError as torch_device.
    """
    return torch_device(config.device, "model.device")


def torch_device(name: str, key: str) -> torch.device:
    """Return the device of a name, as device_of does; `key` is the setting that gives it.

    Raises: ValueError for a name that torch does not know, and for a GPU that it does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{key} must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type != "cuda":
        return device
    if device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{key} must be a GPU that torch sees, got {device}, and it sees "
            f"{torch.cuda.device_count()} GPUs: set {key} to cpu, start fewer ranks, or look at "
            "CUDA_VISIBLE_DEVICES and the build of torch"
        )
    return device


def use_device(config: ModelConfig) -> torch.device:
    """Return the run's device; make a GPU with an index the current one, where kernels launch."""
    device = device_of(config)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def load_tokenizer(folder: str, key: str = "model.policy", trusted: bool = False) -> Any:
    """Load the tokenizer of a model folder or hub id, which the setting `key` names.

    trusted: model.trust_remote_code: whether code in its folder may be run.

    Raises: ValueError for a folder without one, of which transformers would make an empty one.
    """
    require_place(folder, key)
    if not any(stored_file(folder, file) for file in TOKENIZER_FILES):
        folder = base_of(folder)  # an adapter may leave it to its base
    tokenizer, why = None, "no file with a vocabulary"
    try:
        require_readable(folder, *TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # the libraries of tokenizers raise many types
        why = one_line(error)
    if tokenizer is None or not tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder:
        raise ValueError(
            f"{key} must have a tokenizer beside its weights, got {folder!r}, which has no "
            f"tokenizer that can be read ({why}): copy tokenizer.json and tokenizer_config.json of "
            "its base model into the folder"
        )
    return tokenizer


def load_model(
    folder: str,
    key: str,
    config: ModelConfig,
    dtype: torch.dtype,
    world: World = ALONE,
    *,
    trained: bool = False,
    merged: bool = True,
) -> Any:
    """Load a causal LM from a folder or hub id, in evaluation mode.

    It is on the run's device. Under torchrun it is still to be sharded: in CPU memory on rank 0,
    and on the meta device elsewhere.

    Args:
        folder: config.policy or config.teacher.
        key: "model.policy" or "model.teacher", which messages name.
        config: says which device, attention and layer kernels to use.
        dtype: the dtype of the weights.
        world: the ranks of the run, which all call this together.
        trained: whether its weights will be trained, which quantised ones cannot be.
        merged: whether an adapter in the folder is merged into its base; else this is the base.
    Raises: ValueError as read_model does, and where model.liger is set but liger-kernel's layers
        cannot be used; RankError in place of both with several ranks.
    """
    device = use_device(config)
    liger = require_liger(device) if config.liger else None
    plain = "trained" if trained else "sharded" if world.launched else None

    def read() -> Any:
        trusted = config.trust_remote_code
        name, use = folder if merged else base_of(folder), plain
        if not merged and quantization(require_loadable(name, key, trusted)):
            use = None  # require_adaptable has refused what cannot be
        return read_model(name, key, dtype, config.attention, device, use, trusted)

    model = _read_on_main(read, folder, dtype, config, world)
    dtype_run = getattr(torch, config.dtype)
    chosen = world.on_main(
        lambda: choice.choose(model, config.attention, device, dtype_run, liger=config.liger)
    )
    if chosen.attention != attention.default(model):
        model.set_attn_implementation(chosen.attention)
    setattr(model, CHOICE, chosen)
    if liger is not None:
        patch_layers(liger, model, key)
    if world.launched or getattr(model, "is_quantized", False):  # it is on its device already
        return model.eval()
    return model.to(device).eval()


def read_model(
    folder: str,
    key: str,
    dtype: torch.dtype,
    attention_name: str | None = None,
    device: torch.device | None = None,
    plain: str | None = None,
    trusted: bool = False,
) -> Any:
    """Read a model with all its weights into CPU memory; an adapter is merged into its base.

    Args:
        device: where a quantised model is put, which cannot be moved later; None: the CPU.
        plain: "trained" or "sharded": what quantised weights cannot be; None: they may be so.
        trusted: model.trust_remote_code: whether code in its folder may be run.
    Raises: ValueError naming the setting `key` for a model that cannot be loaded, or that its files
        do not hold whole, and for a quantised one where it must not be.
    """
    declared = require_loadable(folder, key, trusted)
    if is_adapter(folder):
        base = base_of(folder)
        model = read_model(base, key, dtype, attention_name, device, plain, trusted)
        adapter_folder.merge(model, folder, key)
        return model
    method = quantization(declared)
    if method is not None and plain is not None:
        raise refusal(key, folder, f"its weights are quantised ({method}), and {REMEDY[plain]}")
    where = {} if method is None else {"device_map": {"": device or torch.device("cpu")}}
    try:
        with without_report():
            model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
            model, report = auto_class(model_config).from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention_name,
                trust_remote_code=trusted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # require_complete names them
                **where,
            )
    except Exception as error:  # a model's code and its files' readers raise many types
        raise refusal(key, folder, one_line(error)) from error
    require_complete(model, report, key, folder)
    stored = tensors(folder)
    if method is None:
        require_floats(model, stored, key, folder)
    model.origin = origin_of(model, stored, declared, report)
    if plain == "trained":
        require_trainable(model, key, folder)
    return model


def _read_on_main(
    read: Callable[[], Any], folder: str, dtype: torch.dtype, settings: ModelConfig, world: World
) -> Any:
    """Read a model on rank 0; the others build it on the meta device, without its weights."""
    models: list[Any] = []  # a model stays on its rank: what on_main returns is sent to all
    trusted = settings.trust_remote_code

    def facts() -> tuple[Any, Any, Origin]:
        return models[0].config, models[0].generation_config, models[0].origin

    def build() -> None:
        with torch.device("meta"):
            shell = auto_class(config).from_config(
                config,
                dtype=dtype,
                attn_implementation=settings.attention,
                trust_remote_code=trusted,
            )
        shell.generation_config, shell.origin = generation_config, origin
        models.append(shell)

    world.on_main(lambda: models.append(read()))
    if trusted:  # the class of a configuration in the folder must be known where it arrives
        world.share(lambda: None if world.main else read_config(folder, trusted))
    config, generation_config, origin = world.on_main(facts)
    world.share(lambda: None if world.main else build())
    (model,) = models
    return model


def load_teacher(
    config: TrainConfig, world: World = ALONE, name: str = DEFAULT_TEACHER
) -> Teacher | None:
    """Load a teacher in its compute dtype, sharded under torchrun.

    With model.teacher self it is a copy of model.policy, in float32 where it follows the policy.

    name: which one of config.model.teacher_places.

    Returns: None if the method does not distil.
    Raises: ValueError if the method distils and model.teacher is not set.
    """
    if config.method.kd is None:
        return None
    place, key = config.model.teacher_places.get(name), config.model.teacher_key(name)
    if place is None:
        raise ValueError(
            f'model.teacher must name a folder or hub id when method.kd is "{config.method.kd}", '
            "got nothing: set model.teacher, or use --preset grpo"
        )
    settings, dtype = config.model, getattr(torch, config.model.dtype)
    follows = False
    if place == SELF:
        place, key, follows = settings.policy, "model.policy", settings.self_teacher == "ema"
    model = load_model(place, key, settings, torch.float32 if follows else dtype, world)
    arguments = {"temperature": config.sampling.temperature, "compute_dtype": dtype}
    teacher = Teacher(model, **arguments)
    if follows:
        teacher = EmaTeacher(model, decay=settings.ema_decay, **arguments)
    if world.launched:
        shard(teacher, use_device(config.model), world, offload=config.model.offload_teacher)
    return teacher


def checkpoint_activations(model: Any) -> None:
    """Make a model recompute its activations in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()  # its name in transformers after 5.17
    else:
        model.gradient_checkpointing_enable()


def sketch_of(config: ModelConfig) -> kk.Sketch | None:
    """Return the sketch of the head's gradient; None: the exact gradient."""
    if config.head_backward == "exact":
        return None
    return kk.Sketch(threshold=config.head_threshold, flat=config.head_flat)


def require_adaptable(config: TrainConfig, world: World) -> None:
    """Check, before anything is loaded, that model.lora fits the policy's folder and the run.

    Raises: ValueError for an adapter with other settings, and for a quantised base whose weights an
        engine, another rank or the exported model would need.
    """
    name, adapters = config.model.policy, config.model.lora
    if not adapters.rank:
        return
    lora.require_peft()
    declared = require_loadable(name, "model.policy", config.model.trust_remote_code)
    if is_adapter(name):
        adapter_folder.require_settings(name, adapters, "model.policy")
    method = quantization(declared)
    if method is None:
        return
    shared = config.engine.kind == "generate" and not config.engine.staleness
    refusals = {
        f"its weights are quantised ({method}), and {REMEDY['sharded']}": world.launched,
        "its weights are quantised, which only the engine generate takes: set engine.kind to "
        '"generate" and engine.staleness to 0': not shared,
        "its weights are quantised, and adapters are not merged into such: set model.lora.merge to "
        "false": adapters.merge,
    }
    for why, holds in refusals.items():
        if holds:
            raise refusal("model.policy", name, why)


def load_policy(
    config: TrainConfig,
    teacher_columns: int | None,
    world: World = ALONE,
    policy_class: type[Policy] = Policy,
) -> Policy:
    """Load the policy with its weights in float32, sharded under torchrun.

    With model.lora its weights are in the compute dtype, and adapters are put into it.

    Args:
        teacher_columns: the policy samples no token from here on, which a teacher does not have;
            None: from all of its own.
        policy_class: Policy, or a subclass with another loss.
    """
    name, adapters = config.model.policy, config.model.lora
    if adapters.rank:
        dtype = getattr(torch, config.model.dtype)
        model = load_model(
            name, "model.policy", config.model, dtype, world, trained=True, merged=False
        )
        lora.inject(model, adapters, config.seed)
        if is_adapter(name):
            world.on_main(lambda: adapter_folder.continue_from(model, name, "model.policy"))
    else:
        model = load_model(name, "model.policy", config.model, torch.float32, world, trained=True)
    if config.model.gradient_checkpointing:
        checkpoint_activations(model)
    columns = model.get_output_embeddings().weight.shape[0]
    policy = policy_class(
        model,
        config.method,
        vocab_size=columns if teacher_columns is None else min(columns, teacher_columns),
        workspace_bytes=config.optim.workspace_bytes,
        head_impl=config.optim.head_impl,
        sketch=sketch_of(config.model),
        temperature=config.sampling.temperature,
        compute_dtype=getattr(torch, config.model.dtype),
    )
    if world.launched:
        shard(policy, use_device(config.model), world, offload=config.model.offload_policy)
    return policy
