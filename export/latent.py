"""A converted checkpoint as every export reads it: layer by layer, and refused where it must be."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..converters.checkpoint import Source
from ..converters.errors import InputError
from ..converters.families import FAMILIES, Family, window_in_use
from ..converters.rope_split import multiplied
from ..modeling import CLASSES

AGAIN = "Convert the original again with --to mla --native."


def exportable_family(source: Source) -> Family:
    """The family whose class the checkpoint's class was made from.

    Raises:
        InputError: it is not decoupled MLA with one rank and one list of frequencies.
    """
    config: Any = source.config
    path = source.path
    family = family_of_converted(config)
    if family is None:
        name = (config.architectures or [config.model_type])[0]
        raise InputError(
            f"{path} is {name} already, a stock class that loads without rehead. There is nothing "
            "to export."
        )
    if not family.llama_decoder:
        held = ", ".join(name for name, row in FAMILIES.items() if row.llama_decoder)
        raise InputError(
            f"{path} is a {family.model_type} model, and the classes it could be exported to hold "
            f"Llama's decoder around the attention ({held}). It runs in rehead's own."
        )
    if config.form_name != "MLA":
        form = config.form_name + ("-KR" if getattr(config, "key_reuse", False) else "")
        raise InputError(f"{path} is {form}, which no stock class holds. {AGAIN}")
    if config.cache_codes is not None:
        raise InputError(
            f"{path} caches codes of a few bits, which no stock class and no engine reads. "
            "Convert the original again with --to mla --kv-bits 16, and with --native, or --preset "
            "engine for deepseek and gguf."
        )
    slides = window_in_use(config)
    if slides:
        raise InputError(
            f"{path} slides a window of {slides} tokens, which no class it could be exported to "
            "does. It runs in rehead's own."
        )
    if config.rope_on_read:
        raise InputError(f"{path} rotates its keys on read, which no stock class does. {AGAIN}")
    if config.kv_lora_rank_per_layer or config.qk_rope_head_dim_per_layer:
        raise InputError(
            f"{path} gives its layers different widths, and a stock class has one for all. {AGAIN}"
        )
    lists = {tuple(config.layer_rope_pairs(i)) for i in range(config.num_hidden_layers)}
    if len(lists) > 1:
        raise InputError(
            f"{path} has {len(lists)} lists of rotary frequencies, and a stock class has one for "
            f"all layers. {AGAIN}"
        )
    if not config.qk_rope_head_dim:
        raise InputError(f"{path} rotates nothing, and a stock class rotates something. {AGAIN}")
    if config.rope_parameters["rope_type"] == "dynamic":
        raise InputError(
            f"{path} changes its rotary frequencies with the length of the text (rope_type "
            "dynamic), which cannot be written as a list of frequencies."
        )
    return family


@dataclass(frozen=True)
class LatentLayer:
    """One decoupled MLA layer for an attention that has one key head for every query head.

    Letters: H heads, N position-free key width, R rotated width, V value width, r latent rank,
    D hidden size, Q = H (N + R), Din the queries' inputs: D, or the rank of their first map.

    Args:
        q: scaled so that scores are multiplied by (N + R)^-0.5, the rotary factor included. The
            rotated dims are interleaved: real and imaginary part of a component side by side.
        q_down: the queries' first map, where they have two.
        latent, rope: the two parts of the map into the cache, `rope` interleaved too.
        kv: per head [key | value] from the latent.
        gain: weight of the norm before the layer.
    """

    q: Float[Tensor, "Q Din"]
    latent: Float[Tensor, "r D"]
    rope: Float[Tensor, "R D"]
    kv: Float[Tensor, "HNV r"]
    o: Float[Tensor, "D HV"]
    gain: Float[Tensor, " D"]
    q_down: Float[Tensor, "L D"] | None = None
    q_bias: Float[Tensor, " Q"] | None = None
    latent_bias: Float[Tensor, " r"] | None = None
    rope_bias: Float[Tensor, " R"] | None = None
    kv_bias: Float[Tensor, " HNV"] | None = None
    o_bias: Float[Tensor, " D"] | None = None


class LatentModel:
    """A converted checkpoint that an export reads.

    Args:
        inv_freq: of the rotated components, radians per position.
        long_inv_freq: the same beyond `original_length` tokens, where the source has two lists.
    """

    def __init__(self, source: Source) -> None:
        self.family = exportable_family(source)
        self.source = source
        self.config: Any = source.config
        self.dtype = source.dtype(f"{self.family.prefix(0)}o_proj.weight")
        rotary = rotary_of(source.config)
        self.rope_factor = float(rotary.attention_scaling) ** 2
        self.original_length = source.config.max_position_embeddings
        pairs = source.config.layer_rope_pairs(0)
        self.inv_freq = self.long_inv_freq = rotary.inv_freq[pairs].clone()
        if source.config.rope_parameters["rope_type"] == "longrope":
            self.original_length = source.config.rope_parameters["original_max_position_embeddings"]
            rotary(torch.zeros(1), torch.tensor([[self.original_length]]))  # switches to the other
            self.long_inv_freq = rotary.inv_freq[pairs].clone()

    def layer(self, index: int) -> LatentLayer:
        """One layer's attention, in float64."""
        config = self.config
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        nope, rotated, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        stored = self._stored(self.family.prefix(index))
        pairs, resting = config.layer_rope_pairs(index), config.layer_resting_pairs(index)
        dims = [*resting, *(nope // 2 + pair for pair in resting)]
        phase = torch.zeros(heads, nope, dtype=torch.float64)
        if dims:
            phase[:, dims] = stored["q_phase"]

        def queries(tensor: Tensor) -> Tensor:
            """Rows [position-free | rotated] of every head, which a stock class has."""
            source = tensor.reshape(heads, nope, -1).movedim(-1, 0)  # [Din, H, E]
            real, imag = stored["k_synthesis"].repeat_interleave(heads // groups, 0).chunk(2, -1)
            components = source.unflatten(-1, (2, -1))[..., pairs].flatten(-2)
            turning = multiplied(components, torch.cat([real, -imag], dim=-1)).movedim(0, -1)
            still = multiplied(source, phase).movedim(0, -1)
            factor = ((nope + rotated) / config.head_dim) ** 0.5
            rows = torch.cat([still, interleave(turning, 1) * self.rope_factor], dim=1) * factor
            return rows.flatten(0, 1).reshape(-1, *tensor.shape[1:])

        def every_head(tensor: Tensor) -> Tensor:
            """[key | value] of every head, with nothing where a key leaves no rest."""
            found = tensor.unflatten(0, (groups, -1))
            pair = found.new_zeros(groups, nope + config.v_head_dim, *tensor.shape[1:])
            pair[:, dims], pair[:, nope:] = found[:, : len(dims)], found[:, len(dims) :]
            return pair.repeat_interleave(heads // groups, dim=0).flatten(0, 1)

        q = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        kv_a, kv_a_bias = stored["kv_a_proj_with_mqa.weight"], stored.get("kv_a_proj_with_mqa.bias")
        q_bias, kv_bias = stored.get(f"{q}.bias"), stored.get("kv_b_proj.bias")
        norm = f"{self.family.layers}.{index}.input_layernorm.weight"
        return LatentLayer(
            q=queries(stored[f"{q}.weight"]),
            latent=kv_a[:rank],
            rope=interleave(kv_a[rank:], 0),
            kv=every_head(stored["kv_b_proj.weight"]),
            o=stored["o_proj.weight"],
            gain=self.source.tensor(norm).double(),
            q_down=stored.get("q_a_proj.weight"),
            q_bias=None if q_bias is None else queries(q_bias),
            latent_bias=None if kv_a_bias is None else kv_a_bias[:rank],
            rope_bias=None if kv_a_bias is None else interleave(kv_a_bias[rank:], 0),
            kv_bias=None if kv_bias is None else every_head(kv_bias),
            o_bias=stored.get("o_proj.bias"),
        )

    def other_names(self) -> dict[str, str]:
        """Every tensor that is no layer's attention: its name in a stock class -> as it is stored.

        A tied pair counts once, under the embedding's name.
        """
        layers = range(self.config.num_hidden_layers)
        attention = tuple(self.family.prefix(index) for index in layers)
        names = {name: name for name in self.source.names() if not name.startswith(attention)}
        if self.config.tie_word_embeddings:
            head = names.pop("lm_head.weight", None)
            if head is not None:
                names.setdefault("model.embed_tokens.weight", head)
        return names

    def _stored(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self.source.names() if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.source.tensor(name).double() for name in names}


def family_of_converted(config: PretrainedConfig) -> Family | None:
    """The family whose class a converted model's class was made from; None for a stock class."""
    for rows in CLASSES.values():
        for name, (config_class, _, _) in rows.items():
            if type(config) is config_class:
                return FAMILIES[name]
    return None


def rotary_of(config: PretrainedConfig) -> Any:
    """The model's rotary embedding, without the model."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return type(skeleton.base_model.rotary_emb)(config)


def interleave(tensor: Tensor, dim: int) -> Tensor:
    """[all real parts | all imaginary parts] along `dim` as real, imaginary, real, imaginary."""
    real, imaginary = tensor.chunk(2, dim=dim)
    return torch.stack([real, imaginary], dim=dim + 1).flatten(dim, dim + 1)
