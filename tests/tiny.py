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

SOURCES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
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
DECOUPLED = dict(
    kv_lora_rank=12,
    qk_rope_head_dim=6,
    qk_nope_head_dim=10,
    v_head_dim=8,
    rope_pairs=[[3, 0, 0], [1, 2, 1]],
)
ON_READ = dict(
    kv_lora_rank=12, qk_rope_head_dim=0, qk_nope_head_dim=8, v_head_dim=8, rope_on_read=True
)
ROPE_READ = ON_READ | dict(qk_rope_head_dim=6, rope_pairs=[[3, 0, 0], [1, 2, 1]])
FORMS = {"decoupled": DECOUPLED, "on_read": ON_READ, "rope_read": ROPE_READ}
FACTORED = dict(
    mfa_head_dim=11, share_q_dim=9, qk_rope_head_dim=6, rope_pairs=[[3, 0, 0], [1, 2, 1]]
)
MFA_FORMS = {"mfa": FACTORED, "mfa_kr": FACTORED | dict(key_reuse=True)}
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
    ("rope_read", {}),
    ("rope_read", BIASES | dict(q_lora_rank=7)),
    ("rope_read", UNEVEN["rope_read"]),
]
MFA_UNEVEN = dict(
    mfa_head_dim_per_layer=[11, 5],
    share_q_dim_per_layer=[4, 9],
    qk_rope_head_dim_per_layer=[6, 0],
    rope_pairs=[[3, 0, 0], []],
)
MFA_VARIANTS = [{}, MFA_BIASES | MFA_UNEVEN | dict(use_inter_norm=True)]
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
    """The model with random biases and the like, which transformers would leave at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "kr_alpha")):
                parameter.normal_(0, 0.3)
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


def mfa(family: str = "llama", form: str = "mfa", seed: int = 0, **fields) -> torch.nn.Module:
    """A randomly initialised MFA model of the family and form ("mfa" or "mfa_kr")."""
    torch.manual_seed(seed)
    config_class, model_class = MFA[family]
    fields = {"rope_parameters": ROPE_TYPES["default"]} | MFA_FORMS[form] | fields
    model = fill_biases(model_class(config_class(**BASE | fields))).eval()
    if model.config.use_inter_norm:
        for layer in model.model.layers:
            torch.nn.init.uniform_(layer.self_attn.inter_norm.weight, 0.5, 1.5)
    return model


def side_by_side(keys: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows [g * d, ...] of g heads' keys as [all real parts | all imaginary parts]."""
    return keys.unflatten(0, (groups, 2, -1)).transpose(0, 1).flatten(0, 2)


def spread(queries: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Rows [H, g * d, ...] of the queries [H * d, ...] against `side_by_side` keys.

    A query head is zero outside its own KV head's pairs.
    """
    per_head = queries.unflatten(0, (heads, 2, -1))
    wide = queries.new_zeros(heads, 2, groups, *per_head.shape[2:])
    for h in range(heads):
        wide[h, :, h // (heads // groups)] = per_head[h]
    return wide.flatten(1, 3)


def exact(model: torch.nn.Module, family: str, form: str) -> torch.nn.Module:
    """The stock model rewritten as MLA without loss, by nothing but a layout of its weights.

    On read: the latent is [all keys; all values] before rotation, and `kv_b_proj` picks a head's.
    Decoupled: every pair of every KV head keeps RoPE in the shared key, the latent is all values,
    and a query head is zero outside its own KV head's pairs. With the rotated key read, the same
    key is the latent's tail, and no head has a position-free one.
    """
    old = model.config
    heads, groups, dim = old.num_attention_heads, old.num_key_value_heads, BASE["head_dim"]
    half, width = dim // 2, groups * dim
    pairs = [f for _ in range(groups) for f in range(half)]
    on_read, shared = form != "decoupled", form != "on_read"
    config_class, model_class = MLA[family]
    with_bias = model.model.layers[0].self_attn.q_proj.bias is not None
    new = model_class(
        config_class(
            **BASE,
            rope_parameters=dict(old.rope_parameters),
            kv_lora_rank=2 * width if on_read else width,
            qk_rope_head_dim=width if shared else 0,
            qk_nope_head_dim=dim if on_read else 0,
            v_head_dim=dim,
            rope_pairs=[pairs] * old.num_hidden_layers if shared else None,
            rope_on_read=on_read,
            q_bias=with_bias,
            kv_a_bias=with_bias,
        )
    ).eval()
    state = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    read = on_read and shared
    for i, layer in enumerate(model.model.layers):
        a, at = layer.self_attn, f"model.layers.{i}.self_attn"
        state[f"{at}.o_proj.weight"] = a.o_proj.weight
        if read:
            state[f"{at}.k_rope_bias"] = torch.zeros(width)
        for kind in ("weight", "bias") if with_bias else ("weight",):
            q, k, v = (getattr(p, kind) for p in (a.q_proj, a.k_proj, a.v_proj))
            if shared:  # [all real parts | all imaginary parts]
                k, q = side_by_side(k, groups), spread(q, heads, groups)
                if read:  # and the parts of every pair side by side
                    k = k.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
                    q = torch.cat((q.new_zeros(heads, dim, *q.shape[2:]), q), dim=1)
                q = q.flatten(0, 1)
            state[f"{at}.q_proj.{kind}"] = q
            state[f"{at}.kv_a_proj_with_mqa.{kind}"] = torch.cat((v, k) if shared else (k, v))
        eye = torch.eye(width).view(groups, dim, width)
        if on_read:
            nothing = torch.zeros_like(eye)
            key = torch.cat((nothing if shared else eye, nothing), -1)
            value = torch.cat((eye, nothing) if shared else (nothing, eye), -1)
            state[f"{at}.kv_b_proj.weight"] = torch.cat((key, value), dim=1).flatten(0, 1)
        else:
            state[f"{at}.kv_b_proj.weight"] = eye.flatten(0, 1)
    new.load_state_dict(state)
    return new


def exact_mfa(model: torch.nn.Module, family: str, form: str) -> torch.nn.Module:
    """The stock model rewritten as MFA without loss, by nothing but a layout of its weights.

    Keys and values of all KV heads lie side by side, each pair with its own frequency, and a query
    head is zero outside its own KV head's pairs. MFA-KR: the latent is [values | keys], and its
    map exchanges the two, so that `o_proj` finds the values after the keys.
    """
    old = model.config
    heads, groups, dim = old.num_attention_heads, old.num_key_value_heads, BASE["head_dim"]
    width, hidden = groups * dim, old.hidden_size
    reuse = form == "mfa_kr"
    config_class, model_class = MFA[family]
    with_bias = model.model.layers[0].self_attn.q_proj.bias is not None
    new = model_class(
        config_class(
            **BASE,
            rope_parameters=dict(old.rope_parameters),
            mfa_head_dim=(1 + reuse) * width,
            share_q_dim=hidden,
            qk_rope_head_dim=width,
            rope_pairs=[[*range(dim // 2)] * groups] * old.num_hidden_layers,
            key_reuse=reuse,
            q_bias=with_bias,
            k_bias=with_bias,
            o_bias=with_bias,
        )
    ).eval()
    state = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    for i, layer in enumerate(model.model.layers):
        a, at = layer.self_attn, f"model.layers.{i}.self_attn"
        state[f"{at}.q_proj.weight"] = torch.eye(hidden)
        for kind in ("weight", "bias") if with_bias else ("weight",):
            q, k, v = (getattr(p, kind) for p in (a.q_proj, a.k_proj, a.v_proj))
            k, q = side_by_side(k, groups), spread(q, heads, groups)
            if reuse:
                k, q = torch.cat((v, k)), torch.cat((torch.zeros_like(q), q), dim=1)
            state[f"{at}.wq.{kind}"], state[f"{at}.k_proj.{kind}"] = q.flatten(0, 1), k
        o = torch.zeros(hidden, heads, groups, dim)
        for h in range(heads):
            o[:, h, h // (heads // groups)] = a.o_proj.weight.unflatten(1, (heads, dim))[:, h]
        o = o.flatten(2)  # [hidden, H, g * d]
        if reuse:
            swap = torch.eye(2 * width).roll(width, 0)
            state[f"{at}.kr_alpha"] = alpha = torch.linspace(1, 2, 2 * width)
            state[f"{at}.kr_proj.weight"] = (swap - torch.eye(2 * width)) / alpha[:, None]
            o = torch.cat((torch.zeros_like(o), o), dim=2)
        else:
            state[f"{at}.v_proj.weight"] = a.v_proj.weight
        state[f"{at}.o_proj.weight"] = o.flatten(1)
        if with_bias:  # a query's weights sum to one, so the values' bias is the output's
            state[f"{at}.o_proj.bias"] = (
                torch.zeros(hidden) if reuse else (o @ a.v_proj.bias).sum(-1)
            )
    new.load_state_dict(state)
    return new


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error relative to the largest entry."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def turn(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[real parts | imaginary parts] as complex numbers, times exp(i angles)."""
    n = len(angles)
    z = torch.complex(vector[:n], vector[n:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag))


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
        lambda self, length, cached, mask: always and (length == 1 or mask is not None),
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
