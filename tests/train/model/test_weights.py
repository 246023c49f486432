"""weights: a model has every weight from its files, or is refused with their names."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from kdrl_train.config import ModelConfig
from kdrl_train.model.load import load_model, read_model
from kdrl_train.model.policy import HeadedModel
from kdrl_train.model.weights import require_trainable

Tensors = dict[str, torch.Tensor]
Saved = Callable[..., Path]


@pytest.fixture
def saved(tiny: Callable[..., Any], tmp_path: Path) -> Saved:
    """saved(change, tied=False, family="llama", **settings) -> a folder with changed tensors.

    settings replace those of its config.json.
    """

    def make(
        change: Callable[[Tensors], None], *, tied: bool = False, family: str = "llama", **more: Any
    ) -> Path:
        tiny(family, tie_word_embeddings=tied).save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path, metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        (tmp_path / "config.json").write_text(json.dumps(config | more), encoding="utf-8")
        return tmp_path

    return make


def drop(*names: str) -> Callable[[Tensors], None]:
    """Return a change that removes the tensors whose names hold one of these."""

    def change(state: Tensors) -> None:
        for key in [key for key in state if any(name in key for name in names)]:
            del state[key]

    return change


def nothing(_state: Tensors) -> None:
    """Change nothing."""


def double_head(state: Tensors) -> None:
    """Add a head that is not the embeddings."""
    state["lm_head.weight"] = 2 * state["model.embed_tokens.weight"]


def read(folder: Path) -> Any:
    return read_model(str(folder), "model.policy", torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi"])
def test_absent_weights_are_named(saved: Saved, family: str) -> None:
    folder = saved(drop("lm_head.weight"), family=family)
    with pytest.raises(ValueError, match=r"model\.policy .*: its files lack lm_head\.weight: save"):
        read(folder)


def test_many_absent_weights_are_counted(saved: Saved) -> None:
    folder = saved(drop("layers.1."))  # of 9 tensors: 4 of attention, 3 of the MLP, 2 norms
    with pytest.raises(
        ValueError, match=r"lack model\.layers\.1\.input_layernorm\.weight, .* 6 mo"
    ):
        read(folder)


def test_a_tied_head_needs_no_tensor(saved: Saved) -> None:
    model = read(saved(nothing, tied=True))
    assert "lm_head.weight" not in load_file(Path(model.name_or_path) / "model.safetensors")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_either_of_two_tied_weights_is_enough_and_none_is_not(saved: Saved) -> None:
    def rename(state: Tensors) -> None:
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")

    model = read(saved(rename, tied=True))
    stored = load_file(Path(model.name_or_path) / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.model.embed_tokens.weight, stored)
    folder = saved(drop("embed_tokens"), tied=True)
    with pytest.raises(ValueError, match=r"its files lack .*embed_tokens\.weight"):
        read(folder)


def test_two_weights_that_the_config_ties_are_refused(saved: Saved) -> None:
    folder = saved(double_head, tied=True)
    with pytest.raises(ValueError, match=r"set tie_word_embeddings to false in config\.json$"):
        read(folder)
    model = read(saved(double_head, tied=True, tie_word_embeddings=False))  # the remedy
    assert torch.equal(model.lm_head.weight, 2 * model.model.embed_tokens.weight)


def test_weights_of_another_shape_are_named(saved: Saved) -> None:
    folder = saved(nothing, intermediate_size=80)
    with pytest.raises(
        ValueError, match=r"has shape \[\d+, \d+\] in its files and \[\d+, \d+\] by .* \(6 such"
    ):
        read(folder)


def test_weights_in_8_bits_without_their_scales_are_refused(saved: Saved) -> None:
    def narrow(state: Tensors) -> None:
        for key in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
            state[key] = state[key].to(torch.float8_e4m3fn)

    with pytest.raises(ValueError, match=r": 2 of its weights have 8 bits .*\(model\.lay.*, lm"):
        read(saved(narrow))


def add(**shapes: tuple[int, ...]) -> Callable[[Tensors], None]:
    """Return a change that adds tensors; two underscores in a name stand for a point."""
    return lambda state: state.update(
        {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
    )


def test_parts_that_the_model_lacks_are_counted(saved: Saved) -> None:
    folder = saved(
        add(
            visual__blocks__0__attn__qkv__weight=(3, 3),
            visual__merger__weight=(3,),
            model__audio_tower__conv__bias=(2,),
            model__layers__2__mlp__up_proj__weight=(2, 2),  # beyond the two layers
            model__layers__0__self_attn__q_proj__bias=(32,),
            model__rotary_emb__inv_freq=(8,),
            model__layers__1__self_attn__rotary_emb__inv_freq=(8,),
        )
    )
    origin = read(folder).origin
    assert origin.parts == {"visual": 2, "model.audio_tower": 1, "model.layers.2": 1}
    assert origin.unused == ["model.layers.0.self_attn.q_proj.bias"]


def test_parts_that_the_class_declares_are_counted_too(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = [r"^mtp.*", r"model\.layers\.1.*"]  # layer 1 of this model is not the one meant
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns
    )
    expert = {"model__layers__1__mlp__experts__0__weight": (3,)}  # read under another name
    change = add(mtp__layers__0__weight=(3, 3), mtp__norm__weight=(3,), **expert)
    origin = read(saved(change)).origin
    assert (origin.parts, origin.unused) == ({"mtp": 2}, [])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_text_path_of_a_model_for_images_is_its_own(kind: str, tmp_path: Path) -> None:
    """transformers has no causal LM for these: they are read whole, and keep their tower."""
    text = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    config = transformers.AutoConfig.for_model(
        kind,
        text_config=text | {"rope_parameters": rope},
        vision_config=tower | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        **{f"{name}_token_id": 39 for name in ("image", "video", "vision_start", "vision_end")},
    )
    original = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    ).eval()
    original.save_pretrained(tmp_path)

    model = load_model(str(tmp_path), "model.policy", ModelConfig(device="cpu"), torch.float32)
    require_trainable(model, "model.policy", str(tmp_path))
    lengths = [9, 14]
    sequences = [torch.randint(1, 39, (1, length)) for length in lengths]
    places = [torch.arange(length)[None] for length in lengths]
    with torch.no_grad():
        states = HeadedModel(model).hidden(
            torch.cat(sequences, 1), torch.cat(places, 1), None, lengths
        )
        logits = model.get_output_embeddings()(states).split(lengths)
        for sequence, part in zip(sequences, logits, strict=True):
            assert_close(part, original(input_ids=sequence).logits[0], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "export")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == load_file(tmp_path / "model.safetensors").keys()
    assert any("visual" in name for name in exported)


def test_the_text_part_of_a_larger_model_that_nobody_could_load_is_not_trained() -> None:
    config = transformers.MllamaConfig().get_text_config()
    with torch.device("meta"):
        model = transformers.MllamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"exported, a MllamaForCausalLM with a MllamaTextConfig"):
        require_trainable(model, "model.policy", "a")


def test_transformers_logs_nothing_of_its_own(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its table of absent weights nor what its tensor parallelism leaves whole."""
    logger = logging.getLogger("transformers")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    logger.addHandler(handler)
    try:
        read(saved(nothing))
        with pytest.raises(ValueError, match="norm"):
            read(saved(drop("model.norm")))
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
