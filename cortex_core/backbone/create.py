"""A fresh small language model: a tokenizer, and a decoder whose first weights soon learn to recall.

The decoder is a Llama with biases. It is no Qwen2, because transformers reads every folder of that type with
Qwen2's own tokenizer, whatever tokenizer the folder holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers import LlamaForCausalLM as Decoder
from transformers.models.llama.modeling_llama import LlamaAttention

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# A word keeps the space or underscore before it, a digit stands alone with its space, blanks stay whole.
_SPLIT = r"[ _]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int, markers: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, exact on any text, in which each of `markers` is one token."""
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
    rope_theta: float,
    tied_embeddings: bool,
    seed: int,
) -> Decoder:
    """A Llama decoder in float32 with fresh weights; the same ones for the same seed.

    Small decoders with the usual initialisation stay on a plateau where they answer with *some* value of the
    context. What takes them off it: embeddings that outweigh what the layers add at first, small output
    projections, heads of layer 0 that look back by one and by two, and heads of layer 1 that look up what
    followed the current token before. With them recall was learned in 100 steps; without, not in 500.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=mlp_size,
        max_position_embeddings=window_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tied_embeddings,
        attention_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Decoder(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, _deviation(name), generator=generator)
        if tied_embeddings:
            # Logits of modest size although the output map is the large embedding.
            model.model.norm.weight.fill_(0.16)
    look_back(model, head=0, distance=1)
    if num_heads > 1:
        look_back(model, head=1, distance=2)
    if num_layers > 1 and num_heads > 2:
        look_up(model, generator)
    return model


def _deviation(name: str) -> float:
    """Standard deviation of a fresh weight matrix."""
    scales = {"embed_tokens.": 0.5, "o_proj.": 0.08 * 0.4, "down_proj.": 0.08 * 0.3}
    return next((scale for part, scale in scales.items() if part in name), 0.08)


def look_back(model: Decoder, *, head: int, distance: int, layer: int = 0, strength: float = 7.0) -> None:
    """Bias a head towards the token `distance` positions back, whatever the tokens are.

    With key bias (a, 0) and query bias a(cos theta, -sin theta) turned back by `distance`, the score at
    offset x is a^2 sum_i cos((x - distance) theta_i) / sqrt(d): largest exactly at x = distance.
    """
    attention = _attention(model, layer)
    width = attention.head_dim
    rows = slice(head * width, (head + 1) * width)
    frequency = model.model.rotary_emb.inv_freq.float()
    turn = distance * frequency
    with torch.no_grad():
        attention.q_proj.weight[rows].mul_(0.1)
        attention.k_proj.weight[rows].mul_(0.1)
        attention.k_proj.bias[rows] = strength * torch.cat([torch.ones_like(frequency), torch.zeros_like(frequency)])
        attention.q_proj.bias[rows] = strength * torch.cat([torch.cos(turn), -torch.sin(turn)])


def look_up(model: Decoder, generator: torch.Generator, *, sharpness: float = 2.0, carried: float = 0.7) -> None:
    """Let heads of layer 1 find what followed the current token before; head 0 of layer 0 looks back by 1.

    Orthogonal subspaces of the residual stream, each as wide as a head. Layer 0 copies the code of the
    previous token from the first into the second. Every head of layer 1 but the last compares its own code in
    the first with what the second holds, in the dimensions that rotary positions leave nearly alone over the
    window, and copies one more subspace from where they agree. Together they copy enough of a token to tell
    it from all others, so recall carries over to tokens that were never an answer.
    """
    first, second = _attention(model, 0), _attention(model, 1)
    width, heads = first.head_dim, model.config.num_attention_heads
    size = model.config.hidden_size
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    own, previous, *others = basis.split(width)
    turns = model.model.rotary_emb.inv_freq * model.config.max_position_embeddings
    still = (turns < 0.75).repeat(2)
    with torch.no_grad():
        first.v_proj.weight[:width] = own
        first.o_proj.weight[:, :width] = carried * previous.T
        for head, copied in zip(range(heads - 1), [*others, own], strict=True):
            rows = slice(head * width, (head + 1) * width)
            second.q_proj.weight[rows][still] = sharpness * own[still]
            second.k_proj.weight[rows][still] = sharpness * previous[still]
            second.v_proj.weight[rows] = copied
            second.o_proj.weight[:, rows] = copied.T


def _attention(model: Decoder, layer: int) -> LlamaAttention:
    return cast(LlamaAttention, model.model.layers[layer].self_attn)


def _with_markers(texts: Iterable[str], markers: list[str]) -> Iterator[str]:
    """The texts, then task markers often enough to be merged into one token each."""
    num_bytes = 0
    for text in texts:
        num_bytes += len(text.encode())
        yield text
    repeats = max(64, num_bytes // 2000)
    for marker in markers:
        yield marker * repeats
