"""Low-rank deltas: nothing changes before they have learned, everything is as before once they are off, in any family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.low_rank import LowRankDeltas, layer_of, linear_modules, sizes_of
from cortex_core.backbone.model import Cortex
from cortex_core.errors import ConfigError, IncompatibleError
from tests.backbone.families import CONFIGS, SEGMENT, bare, open_gates, random_ids, small_memory, with_memory


def deltas_for(backbone: PreTrainedModel, *, learned: bool = True, **settings: int) -> LowRankDeltas:
    """For every linear module of every layer; with `learned` they matter."""
    deltas = LowRankDeltas(backbone, linear_modules(backbone), **{"rank": 3} | settings)
    return randomised(deltas) if learned else deltas


@torch.no_grad()
def randomised(deltas: LowRankDeltas, std: float = 0.3) -> LowRankDeltas:
    generator = torch.Generator().manual_seed(2)
    for value in deltas.up:
        value.normal_(std=std, generator=generator)
    return deltas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_no_bit_changes_before_they_learn_and_after_they_are_removed(family: str, dtype: torch.dtype) -> None:
    ids = random_ids(2, 20)
    backbone = bare(family, dtype=dtype)
    plain = backbone(input_ids=ids).logits
    model = Cortex.attach(backbone, small_memory(), segment_tokens=SEGMENT)
    open_gates(model)
    reading, print_before = model(input_ids=ids).logits, fingerprint(backbone)
    deltas = deltas_for(backbone, learned=False).attach(model)
    assert torch.equal(model(input_ids=ids).logits, reading)
    assert torch.equal(model.backbone(input_ids=ids).logits, plain)
    randomised(deltas)
    assert model(input_ids=ids).logits.dtype == dtype
    assert not torch.equal(model(input_ids=ids).logits, reading)
    assert not torch.equal(model.backbone(input_ids=ids).logits, plain)
    with model.memory(False):
        assert torch.equal(model(input_ids=ids).logits, plain)
    deltas.remove()
    assert torch.equal(model(input_ids=ids).logits, reading)
    assert torch.equal(model.backbone(input_ids=ids).logits, plain)
    assert fingerprint(backbone) == print_before


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_it_is_the_model_with_changed_weights(family: str) -> None:
    """The oracle: scale · B A written into the weights of a copy. Conv1D keeps its weight transposed."""
    backbone, changed, ids = bare(family), bare(family), random_ids(2, 20)
    deltas = randomised(LowRankDeltas(backbone, linear_modules(backbone), rank=3, scale=0.7), std=0.05)
    for name in deltas.names:
        module, delta = changed.get_submodule(name), deltas.weight_delta(name)
        assert isinstance(module.weight, Tensor)
        module.weight += delta if isinstance(module, nn.Linear) else delta.T
    with deltas.attached(backbone):
        assert torch.allclose(backbone(input_ids=ids).logits, changed(input_ids=ids).logits, atol=1e-4)


@torch.no_grad()
def test_the_bare_model_generates_without_them() -> None:
    model, ids = with_memory(), random_ids(2, 9)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with model.memory(False):
        plain = model.generate(input_ids=ids, **options)
    with deltas_for(model.backbone).attached(model):
        assert not torch.equal(model.backbone.generate(input_ids=ids, **options), plain)
        with model.memory(False):
            assert torch.equal(model.generate(input_ids=ids, **options), plain)


@torch.no_grad()
def test_a_switch_and_removal() -> None:
    backbone, ids = bare("llama"), random_ids(1, 9)
    plain, deltas = backbone(input_ids=ids).logits, deltas_for(backbone)

    def unchanged() -> bool:
        return torch.equal(backbone(input_ids=ids).logits, plain)

    deltas.attach(backbone)
    assert deltas.attach(backbone) is deltas
    assert deltas.active
    assert not unchanged()
    with deltas.off():
        with deltas.off():
            assert unchanged()
        assert unchanged()
    assert not unchanged()
    deltas.remove()
    deltas.remove()
    assert unchanged()
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize("within", ["off", "attached"])
@torch.no_grad()
def test_an_error_leaves_them_as_they_were(within: str) -> None:
    backbone = bare("llama")
    deltas = deltas_for(backbone)
    if within == "off":
        deltas.attach(backbone)
    with pytest.raises(RuntimeError, match="boom"), deltas.off() if within == "off" else deltas.attached(backbone):
        raise RuntimeError("boom")
    assert deltas.active == deltas.on(backbone) == (within == "off")


@torch.no_grad()
def test_two_sets_are_added_and_removed_independently() -> None:
    backbone, ids = bare("qwen2"), random_ids(1, 9)
    first = randomised(LowRankDeltas(backbone, linear_modules(backbone, ["*.mlp.*"]), rank=2))
    second = deltas_for(backbone)
    with second.attached(backbone):
        alone = backbone(input_ids=ids).logits
        with first.attached(backbone):
            assert not torch.equal(backbone(input_ids=ids).logits, alone)
        assert torch.equal(backbone(input_ids=ids).logits, alone)


def test_deltas_are_no_part_of_the_model() -> None:
    model = with_memory()
    names, identity = {name for name, _ in model.named_parameters()}, model.identity()
    deltas = deltas_for(model.backbone).attach(model)
    assert {name for name, _ in model.named_parameters()} == names
    assert model.identity() == identity
    assert set(deltas.state_dict()) == {f"{half}.{n}" for half in ("down", "up") for n in range(len(deltas.names))}
    assert not any(value.requires_grad for value in deltas.parameters())
    assert all(value.dtype == torch.float32 for value in deltas.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_gradients_flow_to_deltas_and_nowhere_else(family: str, dtype: torch.dtype) -> None:
    backbone, ids = bare(family, dtype=dtype), random_ids(2, 12)
    backbone.requires_grad_(False)
    deltas = deltas_for(backbone).attach(backbone)
    deltas.requires_grad_(True)
    backbone(input_ids=ids).logits.square().mean().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in deltas.parameters())
    assert all(value.grad is None for value in backbone.parameters())


def memory_gradients(checkpointed: bool) -> dict[str, Tensor]:
    """Deltas below, in and above memory layers, with the memory's own hooks, over several segments."""
    model = with_memory("llama")
    deltas = deltas_for(model.backbone).attach(model)
    deltas.requires_grad_(True)
    if checkpointed:
        model.checkpoint_gradients()
    logits = model(input_ids=random_ids(2, 70)).logits
    assert logits is not None
    logits.float().log_softmax(-1)[..., 5].mean().backward()
    return {name: value.grad for name, value in deltas.values().items() if value.grad is not None}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    kept, again = memory_gradients(False), memory_gradients(True)
    assert len(kept) == 2 * len(linear_modules(bare("llama")))
    assert kept.keys() == again.keys()
    assert all(torch.allclose(kept[name], again[name], rtol=1e-4, atol=1e-7) for name in kept)


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 65])
@torch.no_grad()
def test_a_split_input_reads_as_a_whole_one(cut: int) -> None:
    model, ids = with_memory(), random_ids(1, 71)
    with deltas_for(model.backbone).attached(model):
        whole = model(input_ids=ids, session=model.new_session()).logits
        session = model.new_session()
        parts = [model(input_ids=part, session=session).logits for part in (ids[:, :cut], ids[:, cut:])]
        model.read(ids, reader := model.new_session())
    assert whole is not None
    assert torch.allclose(torch.cat([part for part in parts if part is not None], 1), whole, atol=1e-4)
    assert all(torch.allclose(reader.states[n].up, session.states[n].up, atol=1e-5) for n in reader.states)


def test_a_delta_does_not_depend_on_the_others() -> None:
    backbone = bare("llama")
    names = linear_modules(backbone)
    every, last = LowRankDeltas(backbone, names, seed=3), LowRankDeltas(backbone, names[-1:], seed=3)
    assert torch.equal(every.down[-1], last.down[0])
    assert not torch.equal(LowRankDeltas(backbone, names[-1:], seed=4).down[0], last.down[0])
    assert 0.5 < float(last.down[0].norm(dim=1).mean()) < 1.5


@pytest.mark.parametrize(
    ("family", "patterns", "layers", "count"),
    [
        ("llama", ["*"], None, 21),
        ("llama", ["*.mlp.*"], None, 9),
        ("llama", ["*.q_proj", "*.v_proj"], [1], 2),
        ("gpt2", ["*.c_fc", "*.c_proj"], [0, 2], 6),
        ("gpt_neox", ["*.dense_4h_to_h"], None, 3),
        ("phi3", ["*.qkv_proj"], None, 3),
    ],
)
def test_modules_are_found_by_pattern_and_layer(
    family: str, patterns: list[str], layers: list[int] | None, count: int
) -> None:
    backbone = bare(family)
    names = linear_modules(backbone, patterns, layers)
    assert len(names) == count
    assert all(sizes_of(backbone.get_submodule(name)) for name in names)
    assert names == [name for name in linear_modules(backbone) if name in names]
    assert {layer_of(name) for name in names} == set(range(3) if layers is None else layers)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda b: linear_modules(b, ["*.nope"]), ConfigError, r"'\*\.nope' matches no linear module of LlamaFor.*model\.layers\.2\.mlp\.up_proj"),
        (lambda b: linear_modules(b, ["*"], [1, 7]), ConfigError, r"layers = \[7\]: LlamaForCausalLM has layers 0 to 2"),
        (lambda b: LowRankDeltas(b, []), ConfigError, "give at least one module, and each once"),
        (lambda b: LowRankDeltas(b, ["lm_head", "lm_head"]), ConfigError, "each once"),
        (lambda b: LowRankDeltas(b, ["model.layers.0.mlp.up_proj"], rank=33), ConfigError, r"rank = 33 must lie in 1 to 32, .*\(32 to 48\)"),
        (lambda b: LowRankDeltas(b, ["model.layers.0.mlp.up_proj"], rank=0), ConfigError, "rank = 0 must lie in 1 to 32"),
        (lambda b: LowRankDeltas(b, ["model.layers.9.x"]), IncompatibleError, "'model.layers.9.x' is no module of it"),
        (lambda b: LowRankDeltas(b, ["model.norm"]), IncompatibleError, "'model.norm' is a LlamaRMSNorm, not a linear module"),
        (lambda b: deltas_for(b).attach(bare("gpt2")), IncompatibleError, r"is no module of it \(GPT2LMHeadModel\)"),
        (lambda b: deltas_for(b).attach(b).attach(bare("llama")), ConfigError, r"another model; call remove\(\) first"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    wrong: Callable[[PreTrainedModel], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        wrong(bare("llama"))
    assert "\n" not in str(raised.value)


def test_modules_of_another_size_are_refused() -> None:
    wide = bare("llama")
    deltas = LowRankDeltas(wide, ["model.layers.0.mlp.up_proj"])
    narrow = bare("llama")
    narrow.model.layers[0].mlp.up_proj = nn.Linear(32, 40)
    with pytest.raises(IncompatibleError, match="maps 32 to 40 here, 32 to 48 where"):
        deltas.attach(narrow)
    assert not deltas.active


def test_no_half_of_a_refused_attachment_stays() -> None:
    backbone, other = bare("llama"), bare("llama")
    deltas = deltas_for(backbone)
    other.model.layers[2].mlp.down_proj = nn.Identity()
    with pytest.raises(IncompatibleError, match="Identity, not a linear module"):
        deltas.attach(other)
    assert not any(module._forward_hooks for module in other.modules())
