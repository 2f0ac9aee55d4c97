"""A fresh small language model: its tokenizer, trained here, and a Qwen2 decoder with an initialisation that learns to recall."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# A word keeps the space or the underscore before it; a digit stands alone, with its space; runs of white space stay whole.
_SPLIT = r"[ _]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, markers: Iterable[str]
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which each of `markers` is one token; any text can be encoded and decoded exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_with_markers(texts, list(markers)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def create_model(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    mlp_size: int,
    window_tokens: int,
    tied_embeddings: bool,
    seed: int,
) -> Qwen2ForCausalLM:
    """A Qwen2 decoder in float32 with fresh weights; the same ones for the same seed.

    Small decoders with the usual initialisation stay on a plateau where they answer with *some* value of the context.
    Three things take them off it: embeddings that outweigh what the layers add at first (standard deviation 0.5), small
    output projections, and heads in layer 0 that look at the last token and the one before it from the start.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=mlp_size,
        max_position_embeddings=window_tokens,
        tie_word_embeddings=tied_embeddings,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.4)
            layer.mlp.down_proj.weight.mul_(0.3)
        if tied_embeddings:
            # Logits of modest size although the output map is the large embedding.
            model.model.norm.weight.fill_(0.16)
    look_back(model, head=0, distance=1)
    if num_heads > 1:
        look_back(model, head=1, distance=2)
    return model


def look_back(model: Qwen2ForCausalLM, *, head: int, distance: int, layer: int = 0, strength: float = 6.0) -> None:
    """Bias a head towards the token `distance` positions back, whatever the tokens are.

    With key bias (a, 0) and query bias a(cos theta, -sin theta) turned back by `distance`, the score at offset x is
    a^2 sum_i cos((x - distance) theta_i) / sqrt(d): largest exactly at x = distance.
    """
    attention = model.model.layers[layer].self_attn
    width = attention.head_dim
    rows = slice(head * width, (head + 1) * width)
    frequency = model.model.rotary_emb.inv_freq.float()
    turn = distance * frequency
    with torch.no_grad():
        attention.q_proj.weight[rows].mul_(0.1)
        attention.k_proj.weight[rows].mul_(0.1)
        attention.k_proj.bias[rows] = strength * torch.cat([torch.ones_like(frequency), torch.zeros_like(frequency)])
        attention.q_proj.bias[rows] = strength * torch.cat([torch.cos(turn), -torch.sin(turn)])


def _with_markers(texts: Iterable[str], markers: list[str]) -> Iterator[str]:
    """The texts, then task markers often enough to be merged into one token each."""
    num_bytes = 0
    for text in texts:
        num_bytes += len(text.encode())
        yield text
    repeats = max(64, num_bytes // 2000)
    for marker in markers:
        yield marker * repeats
