"""The code of cached rows, and the attention that reads it, against a naive reference."""

import pytest
import tiny
import torch
from coded_models import made
from hypothesis import given
from hypothesis import strategies as st
from tiny import as_complex, error

from rehead.modeling.coding import BITS, Code
from rehead.modeling.latent_attention import LatentAttention
from rehead.modeling.rope_slots import SlotAngles

CODES = st.lists(st.integers(0, 3), min_size=7, max_size=7).filter(any).map(tuple).map(Code)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(code=CODES, seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]))
def test_a_code_is_read_as_the_middle_of_the_step(dtype, code, seed, scale):
    """Exactly, in every dtype, whether a row was packed or not."""
    draw = torch.Generator().manual_seed(seed)
    rows = (torch.randn(2, 3, code.channels, generator=draw) * scale).to(dtype)
    packed, half = code.packed(rows), tiny.half_steps(code).to(dtype)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, code.bytes)
    bits = [b for count, b in zip(code.by_bits(), BITS, strict=True) for _ in range(count)]
    assert sorted(half.tolist(), reverse=True) == [2 ** (b - 1) for b in bits]
    assert code.bytes * 8 == sum(bits)
    want = torch.minimum(torch.maximum(rows.floor(), -half), half - 1) + 0.5
    want[..., code.coded :] = 0
    assert code.coded == code.channels - code.first
    assert torch.equal(code.rounded(rows), want)
    assert torch.equal(code.rounded(rows.requires_grad_()), want)
    assert torch.equal(code.widened(packed, dtype) + 0.5, want)


def test_channels_share_bytes():
    """A byte holds channels of 8, 6+2, 5+3, 4+4, 3+3+2 or 2+2+2+2 bits, and of no others."""
    code = Code((1, 1, 1, 1, 1, 1, 2))
    assert code.bytes == 6 and code.by_bits() == (1, 1, 1, 2, 3, 6, 2)
    rows = torch.zeros(code.channels)
    changed = []  # bytes, by channel
    for channel in range(code.channels):
        other = rows.clone()
        other[channel] = 1.0 if code.bits()[channel] else 5.0
        found = (code.packed(other) != code.packed(rows)).nonzero().flatten()
        changed.append(found.tolist())
    shared = [[code.bits()[c] for c in range(code.coded) if changed[c] == [b]] for b in range(6)]
    assert shared == [[8], [6, 2], [5, 3], [4, 4], [3, 3, 2], [2, 2, 2, 2]]
    assert changed[-2:] == [[], []]


@pytest.mark.parametrize("counts", [(1, 1, 0), (0, 0, 0, 0, 0, 0, -1), (1,) * 8])
def test_counts_of_another_number_or_below_zero_are_refused(counts):
    with pytest.raises(ValueError, match=r"Give 7 counts of 0 or more: of bytes .* 8, 6\+2, 5\+3"):
        Code(counts)


def test_the_gradient_of_a_code_is_that_of_a_clamp():
    code = Code((1, 1, 1, 1, 1, 1, 3))
    half = tiny.half_steps(code)
    for share, want in ((0.3, 1.0), (-0.3, 1.0), (1.1, 0.0), (-1.1, 0.0)):
        rows = (share * half).requires_grad_()
        (grad,) = torch.autograd.grad(code.rounded(rows).sum(), rows)
        assert torch.equal(grad[: code.coded], torch.full_like(grad[: code.coded], want))
        assert not grad[code.coded :].any()


def naive(f: LatentAttention, x: torch.Tensor, angles: SlotAngles, twist: str = ""):
    """The block's output [T, hidden] on x [T, hidden], one head and one pair of tokens at a time.

    `twist` breaks one thing on purpose: "code", nothing is coded; "first", the first tokens are
    coded as all others; "frequency"; "scaling", that of RoPE; "mean", left out; "before",
    components are coded before their rotation.
    """
    c, length, heads, dim = f.config, len(x), f.config.num_attention_heads, f.config.head_dim
    groups, n = c.num_key_value_heads, f.qk_rope_head_dim
    freqs = angles.inv_freq.double()
    freqs = freqs.roll(1) if twist == "frequency" else freqs
    turn = torch.polar(freqs.new_ones(length, dim // 2), torch.arange(length)[:, None] * freqs)
    scaling = 1.0 if twist == "scaling" or not (n or c.rope_on_read) else angles.score_scaling

    def norm_of(norm, heads_of_x):  # of each head, or of all together
        flat = heads_of_x.flatten(1) if c.norm_all_heads else heads_of_x
        return tiny.naive_norm(norm, flat).view(heads_of_x.shape) if c.qk_norm else heads_of_x

    def read_back(row, code):
        half = tiny.half_steps(code).double()
        middle = torch.minimum(torch.maximum(row.floor(), -half), half - 1) + 0.5
        middle[:, code.coded :] = 0
        kept = 0 if twist == "first" else c.exact_tokens
        return row if twist == "code" else torch.cat((row[:kept], middle[kept:]))

    query = as_complex(norm_of(getattr(f, "q_norm", None), f.q_proj(x).view(length, heads, dim)))
    row = f.kv_a_proj_with_mqa(x)
    scales = torch.ones(length, groups, dtype=torch.float64)

    def scales_of(key):  # a norm's weight is in its keys
        plain = torch.cat((key.real, key.imag), -1)
        plain = plain.flatten(1) if c.norm_all_heads else plain
        weight = f.k_norm.weight.view(plain.shape[1:] if c.norm_all_heads else (-1,))
        inverse = tiny.naive_norm(f.k_norm, plain / weight, weight=False)
        return inverse.view(length, -1).expand(-1, groups)

    if n:
        code_k, code_v = (Code(tuple(counts)) for counts in c.cache_codes[f.layer_idx])
        pairs = torch.tensor(c.rope_pairs[f.layer_idx])
        factors, mean = as_complex(f.k_synthesis), as_complex(f.k_mean)
        mean = torch.zeros_like(mean) if twist == "mean" else mean

        def spread(z):  # sum over the components of every frequency, [T, g, dim / 2]
            key = torch.zeros(length, groups, dim // 2, dtype=z.dtype)
            for j, pair in enumerate(pairs):
                key[..., pair] += factors[:, j] * z[:, None, j]
            return key

        z = as_complex(row[:, :n], neighbours=True)
        if c.qk_norm:
            scales = scales_of(spread(z) + as_complex(f.k_mean))
        z = z if twist == "before" else z * turn[:, pairs]
        z = as_complex(read_back(torch.view_as_real(z).flatten(1), code_k), neighbours=True)
        z = z * turn[:, pairs] if twist == "before" else z
        key = spread(z) + mean * turn[:, None]
        value = f.kv_b_proj(read_back(row[:, n:], code_v)).view(length, groups, dim)
        query = query * turn[:, None]
    else:
        code = Code(tuple(c.cache_codes[f.layer_idx][0]))
        both = f.kv_b_proj(read_back(row, code)).view(length, groups, 2 * dim)
        value = both[..., dim:]
        if c.rope_on_read:
            key = as_complex(norm_of(getattr(f, "k_norm", None), both[..., :dim])) * turn[:, None]
            query = query * turn[:, None]
        else:
            key, query = as_complex(both[..., :dim]), query * as_complex(f.q_phase)
            if c.qk_norm:
                scales = scales_of(as_complex(f.kv_b_proj(row).view(both.shape)[..., :dim]))

    def score(h, g, t, s):
        return (query[t, h].conj() * key[s, g]).sum().real * scales[s, g]

    of_head = [h // (heads // groups) for h in range(heads)]
    return f.o_proj(tiny.naive_mixtures(score, value, of_head, dim**-0.5 * scaling))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["llama", "yarn", "norm of a head", "norm of all heads"])
@pytest.mark.parametrize("layout", tiny.CODED)
@torch.no_grad()
def test_block_equals_naive_reference_and_no_twin_does(layout, case, implementation):
    model = made(case, layout)
    model.set_attn_implementation(implementation)
    x = torch.randn(1, 9, 32).double()
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None].double()
    rope = model.model.rotary_emb(x, torch.arange(9)[None])
    for layer in model.model.layers:
        attention = layer.self_attn
        assert type(attention) is tiny.ATTENTION[layout]
        got = attention(x, rope, mask)[0][0]
        assert error(got, naive(attention, x[0], rope[2])) < 1e-5
        twists = ["code", "first"]
        if layout != "mla":
            twists += ["frequency"] + ["scaling"] * (case == "yarn")
        for twist in twists + ["mean", "before"] * (layout == "turned keys"):
            assert error(got, naive(attention, x[0], rope[2], twist)) > 1e-2, twist
