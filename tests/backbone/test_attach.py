"""Any decoder family: nothing changes until the gate opens, and what cannot be attached is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from cortex_core.backbone.attach import chosen_layers
from cortex_core.backbone.model import Cortex
from cortex_core.config import FastWeightsConfig
from cortex_core.errors import ConfigError, IncompatibleError
from tests.backbone.families import CONFIGS, SEGMENT, bare, open_gates, random_ids, small_memory, with_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_an_untrained_memory_changes_no_bit(family: str, attention: str, dtype: torch.dtype) -> None:
    ids = random_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, 15:] = 0
    backbone = bare(family, attention, dtype)
    plain, masked = backbone(input_ids=ids).logits, backbone(input_ids=ids, attention_mask=mask).logits
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    left = mask[:2]
    generated = backbone.generate(input_ids=ids[:2], attention_mask=left, **options)
    model = Cortex.attach(backbone, small_memory(adapter_rank=4), segment_tokens=SEGMENT)
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, masked)
    assert torch.equal(model.generate(input_ids=ids[:2], attention_mask=left, **options), generated)
    open_gates(model)
    assert not torch.equal(model(input_ids=ids).logits, plain)
    with model.memory(False):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, masked)
        assert torch.equal(model.generate(input_ids=ids[:2], attention_mask=left, **options), generated)


@torch.no_grad()
def test_backbone_is_frozen_and_untouched() -> None:
    backbone = bare("qwen2")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = Cortex.attach(backbone, small_memory(), segment_tokens=SEGMENT)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("sidecars.") for name in trainable)
    model(input_ids=random_ids(2, 100))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_delegates_to_the_backbone() -> None:
    model = with_memory()
    assert model.config is model.backbone.config
    assert model.device == model.backbone.device
    assert model.dtype == torch.float32
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


def test_memory_switch_is_restored_after_an_error() -> None:
    model = with_memory()
    with pytest.raises(RuntimeError, match="boom"), model.memory(False):
        raise RuntimeError("boom")
    assert not torch.equal(model(input_ids=random_ids(1, 9)).logits, model.backbone(input_ids=random_ids(1, 9)).logits)


def test_an_encoder_decoder_is_refused_by_name() -> None:
    config = tf.T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    with pytest.raises(IncompatibleError, match=r"T5ForConditionalGeneration.*decoder-only"):
        Cortex.attach(tf.AutoModelForSeq2SeqLM.from_config(config))


def test_attention_outside_the_interface_is_refused_by_name() -> None:
    config = tf.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(IncompatibleError, match=r"MambaForCausalLM.*AttentionInterface"):
        Cortex.attach(tf.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("settings", "segment", "message"),
    [
        ({"rank": 9}, 32, "rank = 9 exceeds .* head_dim = 8: choose at most 8, a memory is no wider"),
        ({"rank": 8, "adapter_rank": 33}, 32, "adapter_rank = 33 exceeds the 32 dimensions .*: choose at most 32"),
        ({"rank": 8, "chunk_size": 8}, 128, "segment_tokens = 128 exceeds the backbone's window of 64"),
        ({"rank": 8, "layers": (3,)}, 64, r"layers = \[3\]: the backbone has layers 0 to 2"),
    ],
)
def test_sizes_that_do_not_fit(settings: dict, segment: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cortex.attach(bare("llama"), FastWeightsConfig(**settings), segment_tokens=segment)


@pytest.mark.parametrize(("num_layers", "layer"), [(1, 0), (2, 1), (4, 1), (24, 6), (80, 20)])
def test_default_layer(num_layers: int, layer: int) -> None:
    assert chosen_layers(FastWeightsConfig(), num_layers) == (layer,)
