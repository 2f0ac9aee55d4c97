from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from cortex_core.backbone.create import create_model, train_tokenizer
from cortex_core.tasks.vocabulary import DIGITS, MARKERS

SHAPE = {
    "hidden_size": 128, "num_layers": 2, "num_heads": 4, "mlp_size": 64, "window_tokens": 128, "rope_theta": 1e6,
    "tied_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["some words to learn from, again and again"], 400, (*MARKERS, *DIGITS))


def test_fresh_heads_look_back_and_look_up() -> None:
    torch.manual_seed(0)
    model = create_model(vocab_size=400, seed=3, **SHAPE)
    model.set_attn_implementation("eager")
    run = torch.randperm(400)[:40]
    with torch.no_grad():
        attention = model(input_ids=torch.cat([run, run])[None], output_attentions=True).attentions
    at = torch.arange(4, 80)
    assert (attention[0][0, 0, at].argmax(-1) == at - 1).float().mean() > 0.95
    assert (attention[0][0, 1, at].argmax(-1) == at - 2).float().mean() > 0.95
    again = torch.arange(42, 80)
    assert (attention[1][0, 0, again].argmax(-1) == again - 39).float().mean() > 0.8


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    models = [create_model(vocab_size=300, seed=seed, **SHAPE) for seed in (4, 4, 5)]
    embeddings = [model.get_input_embeddings().weight for model in models]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])
    assert all(parameter.dtype == torch.float32 for parameter in models[0].parameters())


def test_tokenizer_is_exact_and_knows_the_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def naïve(x_y):\n\treturn 1234 +  x_y  # ok\n\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for marker in (" remember", " recall", " 7"):
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1
    assert len(tokenizer.encode("1234", add_special_tokens=False)) == 4
