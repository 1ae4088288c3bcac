"""Tiny models with a large init, so that softmax is not flat and a wrong rotation shows.

And what the tests of every form measure them with.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rehead.modeling import MFA_CLASSES, MLA_CLASSES
from rehead.modeling.cached_decoding import cache_argument, cache_of
from rehead.modeling.families import FORMS as FORM_ROWS
from rehead.modeling.latent_attention import LatentAttention

SOURCES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
# Every attention module by the name that a config's `layer_layout` gives.
ATTENTION = {name: layout for form in FORM_ROWS.values() for name, layout in form.layouts.items()}
MLA = {family: (config, causal_lm) for family, (config, _, causal_lm) in MLA_CLASSES.items()}
MFA = {family: (config, causal_lm) for family, (config, _, causal_lm) in MFA_CLASSES.items()}
BASE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
DECOUPLED = dict(kv_lora_rank=12, qk_rope_head_dim=6, rope_pairs=[[3, 0, 0], [1, 2, 1]])
ON_READ = dict(kv_lora_rank=12, qk_rope_head_dim=0, rope_on_read=True)
ROPE_READ = ON_READ | dict(qk_rope_head_dim=6, rope_pairs=[[3, 0, 0], [1, 2, 1]])
FORMS = {"decoupled": DECOUPLED, "on_read": ON_READ, "rope_read": ROPE_READ}
# Layouts whose rows are cached as codes, layers with numbers of bits of their own.
CODED = {
    "turned keys": dict(
        kv_lora_rank=12,
        qk_rope_head_dim=12,
        rope_pairs=[[0, 1, 1, 2, 3, 3], [3, 0, 0, 2, 1, 1]],
        cache_codes=[
            [[2, 0, 0, 0, 2, 0, 4], [1, 1, 0, 0, 1, 1, 2]],
            [[0, 2, 2, 2, 0, 0, 0], [2, 0, 1, 1, 0, 1, 2]],
        ],
    ),
    "whole keys": ON_READ
    | dict(cache_codes=[[[1, 1, 1, 0, 1, 1, 0], [0] * 7], [[3, 0, 0, 2, 1, 0, 2], [0] * 7]]),
}
CODED["mla"] = CODED["whole keys"] | dict(rope_on_read=False)
FACTORED = dict(mfa_head_dim=11, qk_rope_head_dim=6, rope_pairs=[[3, 0, 0], [1, 2, 1]])
# Below the head's width every head has rows of the key head's.
NARROW = FACTORED | dict(mfa_head_dim=7)
MFA_FORMS = {
    "mfa": FACTORED,
    "mfa_kr": FACTORED | dict(key_reuse=True),
    "mfa_rows": NARROW,
    "mfa_kr_rows": NARROW | dict(key_reuse=True),
}
MFA_BIASES = dict(q_bias=True, k_bias=True, o_bias=True)
BIASES = dict(q_bias=True, kv_a_bias=True, kv_b_bias=True, o_bias=True)
# Every layer with dims of its own.
UNEVEN = {
    "decoupled": dict(
        kv_lora_rank_per_layer=[12, 5],
        qk_rope_head_dim_per_layer=[6, 0],
        rope_pairs=[[3, 0, 0], []],
    ),
    "on_read": dict(kv_lora_rank_per_layer=[5, 12]),
    # One layer's keys are rotated whole, the other's rotated key is read.
    "rope_read": dict(
        kv_lora_rank_per_layer=[5, 12],
        qk_rope_head_dim_per_layer=[0, 6],
        rope_pairs=[[], [3, 0, 0]],
    ),
}
CASES = [
    ("decoupled", {}),
    ("decoupled", BIASES | dict(q_lora_rank=7)),
    ("decoupled", UNEVEN["decoupled"]),
    ("on_read", {}),
    ("on_read", BIASES | UNEVEN["on_read"] | dict(q_lora_rank=7)),
    # One layer caches its input, the other a latent; the last a latent wider than the input.
    ("on_read", BIASES | dict(kv_lora_rank=32, kv_lora_rank_per_layer=[32, 12])),
    ("on_read", dict(kv_lora_rank=40)),
    ("decoupled", dict(qk_norm=True)),
    ("decoupled", BIASES | UNEVEN["decoupled"] | dict(qk_norm=True)),
    ("rope_read", {}),
    ("rope_read", BIASES | dict(q_lora_rank=7)),
    ("rope_read", UNEVEN["rope_read"]),
]
# Of the wide forms one layer is below the head's width; of the narrow ones both are.
MFA_UNEVEN = {
    form: dict(
        mfa_head_dim_per_layer=[fields["mfa_head_dim"], 5],
        share_q_dim=9,
        share_q_dim_per_layer=[0, 9],
        qk_rope_head_dim_per_layer=[6, 0],
        rope_pairs=[[3, 0, 0], []],
    )
    for form, fields in MFA_FORMS.items()
}
# Layers that differ and are all wide, the second one without rotated components.
MFA_WIDE = dict(
    mfa_head_dim_per_layer=[11, 9], qk_rope_head_dim_per_layer=[6, 0], rope_pairs=[[3, 0, 0], []]
)
MFA_CASES = [
    *((form, {}) for form in MFA_FORMS),
    *((form, MFA_BIASES | dict(share_q_dim=9)) for form in MFA_FORMS),
    *((form, MFA_BIASES | uneven) for form, uneven in MFA_UNEVEN.items()),
    *((form, MFA_WIDE) for form in ("mfa", "mfa_kr")),
    *((form, MFA_BIASES | dict(qk_norm=True)) for form in ("mfa", "mfa_kr", "mfa_rows")),
]
ROPE_TYPES = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 3.5],
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
}


def fill_biases(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random biases and factors, which have a fixed value to begin with."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif name.endswith(("q_phase", "k_synthesis")):
                parameter.normal_(0, 0.7)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5)
    return model


def source(family: str = "llama", seed: int = 0, **fields) -> torch.nn.Module:
    """A randomly initialised stock model of the family."""
    torch.manual_seed(seed)
    config_class, model_class = SOURCES[family]
    fields = {"rope_parameters": ROPE_TYPES["default"]} | fields
    if family == "mistral":
        fields = {"sliding_window": None} | fields
    return fill_biases(model_class(config_class(**BASE | fields))).eval()


def mla(family: str = "llama", form: str = "decoupled", seed: int = 0, **fields) -> torch.nn.Module:
    """A randomly initialised MLA model of the family and one of the `FORMS`."""
    torch.manual_seed(seed)
    config_class, model_class = MLA[family]
    fields = {"rope_parameters": ROPE_TYPES["default"]} | FORMS[form] | fields
    return fill_biases(model_class(config_class(**BASE | fields))).eval()


def coded(
    layout: str = "turned keys", family: str = "llama", source: dict | None = None, **fields
) -> torch.nn.Module:
    """A randomly initialised MLA model of the family that caches codes of a layout in `CODED`.

    Rows are as large as codes reach, so that every step counts and a few numbers are clamped; what
    reads them is as much smaller.

    Args:
        source: the source's own fields; None for those of a Llama.
    """
    torch.manual_seed(0)
    config_class, model_class = MLA[family]
    source = source or BASE | dict(rope_parameters=ROPE_TYPES["default"])
    own = CODED[layout] | BIASES | dict(qk_norm=config_class.norms_keys)
    model = fill_biases(model_class(config_class(**source | own | fields))).eval()
    with torch.no_grad():
        for attention in model.modules():
            if isinstance(attention, LatentAttention):
                _spread_over_steps(attention)
    return model


def _spread_over_steps(attention: LatentAttention):
    rows = attention.kv_a_proj_with_mqa
    codes = attention.stored.keys, attention.stored.values
    deviation = 0.45 * torch.cat([half_steps(code) for code in codes])
    size = deviation / rows.weight.norm(dim=1)
    rows.weight.mul_(size[:, None])
    rows.bias.mul_(size)
    attention.kv_b_proj.weight.div_(deviation[-attention.kv_lora_rank :])
    if attention.qk_rope_head_dim and hasattr(attention, "k_mean"):
        pairs = deviation[: attention.qk_rope_head_dim].view(-1, 2)
        attention.k_synthesis.div_(pairs.mT.flatten()).mul_(1.5)
        attention.k_mean.normal_(0, 0.7)


def half_steps(code) -> torch.Tensor:
    """Half of the steps that each channel of a code has, [c]."""
    return code.rounded(torch.full((code.channels,), 1e6)) + 0.5


def mfa(family: str = "llama", form: str = "mfa", seed: int = 0, **fields) -> torch.nn.Module:
    """A randomly initialised MFA model of the family and one of the `MFA_FORMS`."""
    torch.manual_seed(seed)
    config_class, model_class = MFA[family]
    fields = {"rope_parameters": ROPE_TYPES["default"]} | MFA_FORMS[form] | fields
    return fill_biases(model_class(config_class(**BASE | fields))).eval()


def side_by_side(keys: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows [g * d, ...] of g heads' keys as [all real parts | all imaginary parts]."""
    return keys.unflatten(0, (groups, 2, -1)).transpose(0, 1).flatten(0, 2)


def unit_synthesis(groups: int, pairs: int) -> torch.Tensor:
    """Factors by which a query meets its own KV head's components as they are, and no others.

    There is a component for every pair of every KV head, head by head, so that no key has a rest.
    """
    own = torch.eye(groups).repeat_interleave(pairs, 1)
    return torch.cat((own, torch.zeros_like(own)), dim=1)


def exact(model: torch.nn.Module, family: str, form: str) -> torch.nn.Module:
    """The stock model rewritten as MLA without loss, by nothing but a layout of its weights.

    On read: the latent is [all keys; all values] before rotation, and `kv_b_proj` picks a head's;
    or, where it would be as wide as the model, the input, and `kv_b_proj` the source's projections.
    Decoupled: every pair of every KV head keeps RoPE in the shared key, so that no key has a rest,
    and the latent is all values. With the rotated key read, the same key is the latent's tail.
    """
    old = model.config
    groups, dim = old.num_key_value_heads, BASE["head_dim"]
    half, width = dim // 2, groups * dim
    pairs = [f for _ in range(groups) for f in range(half)]
    on_read, shared = form != "decoupled", form != "on_read"
    inputs = not shared and 2 * width == old.hidden_size
    config_class, model_class = MLA[family]
    with_bias = model.model.layers[0].self_attn.q_proj.bias is not None
    new = model_class(
        config_class(
            **BASE | dict(num_key_value_heads=groups),
            rope_parameters=dict(old.rope_parameters),
            kv_lora_rank=2 * width if on_read else width,
            qk_rope_head_dim=width if shared else 0,
            rope_pairs=[pairs] * old.num_hidden_layers if shared else None,
            rope_on_read=on_read,
            q_bias=with_bias,
            kv_a_bias=with_bias,
            kv_b_bias=with_bias and inputs,
        )
    ).eval()
    state = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    read = on_read and shared
    for i, layer in enumerate(model.model.layers):
        a, at = layer.self_attn, f"model.layers.{i}.self_attn"
        state[f"{at}.o_proj.weight"] = a.o_proj.weight
        if shared:
            state[f"{at}.k_synthesis"] = unit_synthesis(groups, half)
        if read:
            state[f"{at}.k_rope_bias"] = torch.zeros(width)
        for kind in ("weight", "bias") if with_bias else ("weight",):
            q, k, v = (getattr(p, kind) for p in (a.q_proj, a.k_proj, a.v_proj))
            if shared:  # [all real parts | all imaginary parts]
                k = side_by_side(k, groups)
                if read:  # and the parts of every pair side by side
                    k = k.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
            state[f"{at}.q_proj.{kind}"] = q
            if inputs:
                pair = torch.cat([x.unflatten(0, (groups, dim)) for x in (k, v)], dim=1)
                state[f"{at}.kv_b_proj.{kind}"] = pair.flatten(0, 1)
                continue
            state[f"{at}.kv_a_proj_with_mqa.{kind}"] = torch.cat((v, k) if shared else (k, v))
        if inputs:
            continue
        eye = torch.eye(width).view(groups, dim, width)
        nothing = torch.zeros_like(eye)
        value = torch.cat((eye, nothing) if shared else (nothing, eye), -1)
        value = value[..., : new.config.kv_lora_rank]
        pair = value if shared else torch.cat((torch.cat((eye, nothing), -1), value), dim=1)
        state[f"{at}.kv_b_proj.weight"] = pair.flatten(0, 1)
    new.load_state_dict(state)
    return new


def exact_mfa(model: torch.nn.Module, family: str, form: str) -> torch.nn.Module:
    """The stock model rewritten as MFA without loss, by nothing but a layout of its weights.

    Keys and values of all KV heads lie side by side, each pair with its own frequency, so that no
    key has a rest. MFA-KR: the latent is [values | keys].
    """
    old = model.config
    heads, groups, dim = old.num_attention_heads, old.num_key_value_heads, BASE["head_dim"]
    width, half = groups * dim, dim // 2
    reuse = form == "mfa_kr"
    config_class, model_class = MFA[family]
    with_bias = model.model.layers[0].self_attn.q_proj.bias is not None
    new = model_class(
        config_class(
            **BASE,
            rope_parameters=dict(old.rope_parameters),
            mfa_head_dim=(1 + reuse) * width,
            qk_rope_head_dim=width,
            rope_pairs=[[*range(half)] * groups] * old.num_hidden_layers,
            key_reuse=reuse,
            q_bias=with_bias,
            k_bias=with_bias,
            o_bias=with_bias,
        )
    ).eval()
    state = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    values = torch.eye(width).view(groups, dim, width)
    for i, layer in enumerate(model.model.layers):
        a, at = layer.self_attn, f"model.layers.{i}.self_attn"
        state[f"{at}.k_synthesis"] = unit_synthesis(groups, half)
        for kind in ("weight", "bias") if with_bias else ("weight",):
            q, k, v = (getattr(p, kind) for p in (a.q_proj, a.k_proj, a.v_proj))
            k = side_by_side(k, groups)
            if reuse:  # the parts of every pair side by side, after the values
                k = torch.cat((v, k.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)))
            state[f"{at}.q_proj.{kind}"], state[f"{at}.k_proj.{kind}"] = q, k
        o = a.o_proj.weight
        if reuse:
            read = torch.cat((values, torch.zeros_like(values)), dim=2)
        else:
            read = values
            state[f"{at}.v_proj.weight"] = a.v_proj.weight
        state[f"{at}.v_b_proj.weight"] = read.flatten(0, 1)
        state[f"{at}.o_proj.weight"] = o
        if with_bias:  # a query's weights sum to one, so the values' bias is the output's
            bias = a.v_proj.bias.view(groups, dim).repeat_interleave(heads // groups, 0).flatten()
            state[f"{at}.o_proj.bias"] = torch.zeros(old.hidden_size) if reuse else o @ bias
    new.load_state_dict(state)
    return new


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error relative to the largest entry."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def as_complex(x: torch.Tensor, *, neighbours: bool = False) -> torch.Tensor:
    """[..., 2 n] as n complex numbers: real parts then imaginary parts, or by turns."""
    parts = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else x.chunk(2, dim=-1)
    return torch.complex(*parts)


def at_pairs(z: torch.Tensor, pairs: list[int], count: int) -> torch.Tensor:
    """Complex numbers [..., m] at these of `count` pairs, and 0 at the others."""
    whole = z.new_zeros(*z.shape[:-1], count)
    whole[..., pairs] = z
    return whole


def resting_pairs(config, layer_idx: int) -> list[int]:
    """The pairs of which not every KV head's component is rotated, as the layouts define them."""
    pairs = config.layer_rope_pairs(layer_idx)
    rotated = [pairs.count(pair) for pair in range(config.head_dim // 2)]
    return [pair for pair, count in enumerate(rotated) if count < config.num_key_value_heads]


def naive_norm(norm: torch.nn.Module, x: torch.Tensor, weight: bool = True) -> torch.Tensor:
    """An RMS norm of every row of x, as it is defined, or what it does beside its weight."""
    inverse = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon) ** -0.5
    return x * inverse * norm.weight if weight else inverse[..., 0]


def naive_key_scales(f, rest, synthesis, shared, index) -> torch.Tensor:
    """What the norm multiplies the keys of tokens and KV heads with, [S, g], from the whole keys.

    The arguments are those of `shared_key_score`; the weight of the norm is in the keys.
    """
    if not hasattr(f, "k_norm"):
        return torch.ones(rest.shape[:2], dtype=torch.float64)
    whole = rest.clone()
    for j, pair in enumerate(index.tolist()):
        whole[..., pair] += synthesis[:, j] * shared[:, None, j]
    plain = torch.cat((whole.real, whole.imag), dim=-1) / f.k_norm.weight
    return naive_norm(f.k_norm, plain, weight=False)


def shared_key_score(query, phase, rest, synthesis, shared, index, freqs):
    """score(h, g, t, s) of token t's head h against token s, unscaled, as the layouts define it.

    All are complex but the two last: queries [T, H, f] and their factors [H, f], position-free keys
    [S, g, f], factors [g, n] of the components [S, n], and for each component the query's pair
    and the frequency, [n].
    """

    def score(h: int, g: int, t: int, s: int) -> torch.Tensor:
        free = (phase[h] * query[t, h]).conj() * rest[s, g]
        angles = freqs * (s - t)
        turned = torch.complex(angles.cos(), angles.sin()) * synthesis[g] * shared[s]
        return (free.sum() + (query[t, h, index].conj() * turned).sum()).real

    return score


def naive_mixtures(score, values: torch.Tensor, of_head: list[int], scale: float) -> torch.Tensor:
    """Causal attention [T, H * v] over values [T, g, v], a head and a pair of tokens at a time.

    `of_head` has each head's KV head.
    """
    out = []
    for t in range(len(values)):
        parts = []
        for h, g in enumerate(of_head):
            scores = torch.stack([score(h, g, t, s) * scale for s in range(t + 1)])
            parts.append(scores.softmax(0) @ values[: t + 1, g])
        out.append(torch.cat(parts))
    return torch.stack(out)


def gradients(output: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of a fixed random sum of the output, by the names of the module's parameters; all have one.

    Raises:
        AssertionError: the output does not depend on one of them.
    """
    draw = torch.Generator().manual_seed(5)
    weights = torch.randn(output.shape, generator=draw, dtype=torch.float64).to(output.dtype)
    named = dict(module.named_parameters())
    found = torch.autograd.grad((output * weights).sum(), [*named.values()], allow_unused=True)
    grads = dict(zip(named, found, strict=True))
    assert not [name for name, grad in grads.items() if grad is None or not grad.any()]
    return grads


def block_output(model, layer_idx: int, x: torch.Tensor, implementation: str) -> torch.Tensor:
    """The attention block's own output on x [1, T, hidden], without a cache."""
    model.set_attn_implementation(implementation)
    length = x.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    rope = model.model.rotary_emb(x, torch.arange(length)[None])
    return model.model.layers[layer_idx].self_attn(x, rope, mask)[0]


def cached(model: torch.nn.Module, cache) -> dict:
    """The model's argument that carries a cache, by the name the installed transformers has."""
    return {cache_argument(model): cache}


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] under a padding mask [B, T]."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def step_by_step(model, ids, mask, first: int, sizes: list[int], cache=None) -> torch.Tensor:
    """Logits of a prefill of `first` tokens and then steps of `sizes`, through the cache."""
    positions = positions_of(mask)
    logits, start = [], 0
    for size in (first, *sizes):
        at = slice(start, start + size)
        out = model(
            ids[:, at],
            attention_mask=mask[:, : at.stop],
            position_ids=positions[:, at],
            **cached(model, cache),
            use_cache=True,
        )
        cache, start = cache_of(out), at.stop
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def absorb(monkeypatch, attention: type[torch.nn.Module], always: bool):
    """Take one path always, except that a causal mask left to the attention function needs it."""
    monkeypatch.setattr(
        attention,
        "_can_absorb",
        lambda self, length, keys, mask: always and (length == 1 or mask is not None),
    )


class Largest(TorchDispatchMode):
    """The most numbers any operation wrote to new memory."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        owned = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in owned:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


class FullCache:
    """A cache that a step of one token fills, with keys and values [B, 1, S, ...]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values = keys, values

    def get_seq_length(self, layer_idx):
        return self.keys.shape[2] - 1

    def update(self, keys, values, layer_idx, kwargs):
        return self.keys, self.values


GENERATE = {
    "greedy": dict(do_sample=False),
    "sample": dict(do_sample=True, temperature=0.7),
    "beams": dict(num_beams=3, do_sample=False),
    "static": dict(do_sample=False, cache_implementation="static"),
}


def generated(model, ids, mask, **options) -> list[torch.Tensor]:
    """Twelve tokens more, with a cache and without."""
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        chosen = options if use_cache else options | {"cache_implementation": None}
        results.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=12,
                min_new_tokens=12,
                use_cache=use_cache,
                **chosen,
            )
        )
    return results


REMOTE = """
import sys, torch
sys.modules["rehead"] = None  # importing it raises
from transformers import AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
ids, want = torch.load(folder + "/want.pt")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
with torch.no_grad():
    assert torch.equal(model(ids).logits, want)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model.lm_head(base(ids).last_hidden_state), want)
options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
kept, whole = (model.generate(ids, use_cache=cached, **options) for cached in (True, False))
assert torch.equal(kept, whole)
model.save_pretrained(folder + "/again")
model = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(ids).logits, want)
print("equal")
"""


def load_without_rehead(model, ids: torch.Tensor, folder: Path):
    """Save the model and load it, from its own code, in a process that cannot import rehead."""
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        torch.save((ids, model(ids).logits), folder / "model" / "want.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(folder / "model")],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "equal", done.stderr
