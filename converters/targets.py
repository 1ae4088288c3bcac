"""The forms as a conversion wants them: what a cache may hold, and how a layer is built from it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import modeling
from ..modeling.coding import Code
from .budget import Budget, key_scales
from .calibration import in_precision
from .coded import CodedDims, JointTransform, TurnedTransform
from .coding import CODED, FIRST_CHANNELS, Channels, Dealt, deal
from .errors import InputError
from .families import FAMILIES, head_dim, kv_heads, window_in_use
from .gqa import GQA, POOLINGS, GQAMoments, gqa_moments, to_gqa
from .latent import LatentAttention, with_low_rank_queries
from .maps import AttentionMaps
from .mfa import MFADims, mfa_builder
from .mfa_kr import mfa_kr_builder
from .mla import mla_builder
from .moments import CodingMoments, CodingTokens, LatentMoments, latent_moments
from .plan import READ_MARGIN, READ_SPLITS, TRIED_SPLITS, LayerDims, split_width
from .recipe import LayerReport, Recipe
from .rope_split import (
    Components,
    rope_components,
    shared_rope_pairs,
    standard_rope_pairs,
)

ROPES = ("decoupled", "on-read")
PRESETS = ("engine",)
# MFA's queries may lose, by their low rank, this share of the error that the layer has anyway.
QUERY_SHARE = 0.02
ROUNDING = 1e-8
# Tokens by which the errors of coded channels are measured.
CODED_TOKENS = 4096


class Dims(Protocol):
    """One layer's dims: how much is cached per token, and their names in a config."""

    @property
    def width(self) -> float:
        """Numbers of 16 bits."""
        ...

    def bytes(self, itemsize: int) -> float:
        """Bytes, with the numbers that are not coded of so many each."""
        ...

    def named(self) -> dict[str, int]: ...


class Target(ABC):
    """What a model is converted to.

    Args:
        title: the form's full name.
        options: the recipe's fields that only some forms know, of which this one does.
        default_budget: the share of the source's cache that is kept when nothing is said.
        classes: the form's classes by family.
        stock: the family's own class holds it.
        source: numbers the source caches per token and layer.
        keys, rotatable: how many of them are keys', and how many of those are rotated.
        width: mean width of the converted cache.
        scales: numbers of a layer's cache by which keys are scaled where they are normalised.
        least, most: the narrowest and the widest cache of a layer.
        splits: the shares of a layer's width that are tried as rotated dims.
        fixed: the dims of every layer where nothing is left to choose.
        refits: whether the closed form's output map is fitted once more.
    """

    title: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()
    classes: ClassVar[dict[str, modeling.Classes]]
    default_budget: ClassVar[float] = 0.5
    stock: bool = False
    splits: Sequence[float] = (0.0,)
    fixed: Sequence[Dims] | None = None
    refits: bool = True
    scales: int = 0
    source: int
    width: int
    least: int
    most: int

    def __init__(self, config: PretrainedConfig, recipe: Recipe) -> None:
        _check_heads(config)
        self.config, self.recipe = config, recipe
        self.heads = config.num_attention_heads
        self.kv_heads, self.head_dim = kv_heads(config), head_dim(config)
        self.keys = self.kv_heads * self.head_dim
        self.rotatable = self.kv_heads * FAMILIES[config.model_type].rotary_dim(config)
        self.qk_norm = FAMILIES[config.model_type].qk_norm
        if self.qk_norm and recipe.native:
            raise InputError(
                f"{config.model_type} normalises every key, which --native classes do not. Leave "
                "out --native or --preset."
            )
        ranks = {"q_lora_rank": recipe.q_lora_rank, "share_q_dim": recipe.share_q_dim}
        asked = [name for name, rank in ranks.items() if rank is not None]
        if self.qk_norm and asked and recipe.rope != "on-read":
            raise InputError(
                f"{config.model_type} normalises its queries, which are kept whole. Leave out "
                f"--{asked[0].replace('_', '-')}."
            )
        self.source = 2 * self.keys
        self.width = int(recipe.kv_budget * self.source + 1e-9)

    @property
    def exact(self) -> bool:
        """Whether the cache is wide enough for nothing to be lost."""
        return self.width >= self.most

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        """rehead's class that holds the converted model; None where it is the family's own."""
        return None if self.stock else self.classes[self.config.model_type][2]

    @abstractmethod
    def dims(self, width: int, share: float) -> Dims:
        """A cache of at most this width, about `share` of it rotated."""

    @abstractmethod
    def moments(
        self, maps: AttentionMaps, x: Float[Tensor, "N T D"], generator: torch.Generator
    ) -> Any:
        """What calibration inputs say about a layer."""

    @abstractmethod
    def builder(self, maps: AttentionMaps, moments: Any) -> Callable[[Any], Any]:
        """The closed form of one layer for any dims."""

    def choose(self, error: Callable[[float], float]) -> float:
        """The share of a layer's width to rotate, by the error of any share at mean width."""
        return min(self.splits, key=error)

    def finish(
        self, form: Any, x: Float[Tensor, "N T D"], error: float, generator: torch.Generator
    ) -> Any:
        """The closed form with what its dims do not decide."""
        return form

    def settled(self, form: Any, x: Float[Tensor, "N T D"]) -> Any:
        """A layer that is fitted, in the basis that it is stored in."""
        return form.balanced()

    def named(self, form: Any, dims: Dims) -> dict[str, int]:
        """A finished layer's dims by name, with those chosen while it was built."""
        return dims.named()

    def asked(self, maps: AttentionMaps, moments: Any) -> Any:
        """Facts about one layer that `shared` needs of all layers; None where it needs none."""
        return None

    def shared(self, dims: list[Any], asked: Sequence[Any]) -> list[Any]:
        """The dims with what all layers must have in common.

        Args:
            asked: of every layer.
        """
        return dims

    @abstractmethod
    def config_of(self, layers: Sequence[LayerReport], fields: dict[str, Any]) -> PretrainedConfig:
        """The converted model's config, from the source's fields."""

    def _too_small(self) -> InputError:
        return InputError(
            f"--kv-budget {self.recipe.kv_budget:.2%} leaves {self.width} of the {self.source} "
            "numbers cached per token and layer. Give a larger one."
        )


class LatentTarget(Target):
    """Base class of the MLA targets: one caches 16-bit numbers, the other codes."""

    title = "multi-head latent attention (MLA)"
    options = frozenset({"kv_lora_rank", "qk_rope_head_dim", "q_lora_rank"})
    classes = modeling.MLA_CLASSES

    def __init__(self, config: PretrainedConfig, recipe: Recipe) -> None:
        super().__init__(config, recipe)
        self.on_read = recipe.rope == "on-read"
        if self.on_read and not self.rotatable:
            raise InputError(
                f"{config.model_type} has no RoPE, so that there is nothing to rotate on read. "
                "Leave out --rope on-read."
            )
        rank = recipe.q_lora_rank
        if rank is not None and not 1 <= rank <= config.hidden_size:
            raise InputError(
                f"q_lora_rank={rank} must be at least 1 and at most {config.hidden_size}, the "
                "rank that the queries have."
            )

    def finish(self, form, x, error, generator) -> LatentAttention:
        rank = self.recipe.q_lora_rank
        if rank is None:
            return form
        return with_low_rank_queries(form, x, generator, lambda energy: rank, "q_lora_rank")

    def settled(self, form, x) -> LatentAttention:
        return form.stored(x)

    def config_of(self, layers, fields) -> PretrainedConfig:
        config_class, _, causal_lm = self.classes[self.config.model_type]
        return config_class(
            **fields,
            **_per_layer(layers, {"kv_lora_rank": None, "qk_rope_head_dim": None}),
            q_lora_rank=self.recipe.q_lora_rank,
            rope_pairs=[list(layer.rope_pairs) for layer in layers],
            rope_on_read=self.on_read,
            qk_norm=bool(self.qk_norm),
            architectures=[causal_lm.__name__],
        )


class MLATarget(LatentTarget):
    def __init__(self, config: PretrainedConfig, recipe: Recipe) -> None:
        super().__init__(config, recipe)
        self.engine = recipe.preset == "engine"
        if recipe.native and self.on_read:
            raise InputError("--native classes rotate a key of their own. Use --rope decoupled.")
        slides = window_in_use(config)
        if recipe.native and slides:
            raise InputError(
                f"this {config.model_type} model slides a window of {slides} tokens, which "
                "--native classes do not have. Leave out --native or --preset."
            )
        if self.engine and recipe.q_lora_rank is not None:
            raise InputError("--preset engine keeps the queries whole. Leave out --q-lora-rank.")
        self.scales = 0 if self.on_read else key_scales(config)
        self.budget = Budget.of(config, recipe)
        self.width, self.fixed = self.budget.width, self.budget.fixed
        self.least = (3 if self.rotatable and not self.on_read else 1) + self.scales
        self.most = self.budget.most
        if self.on_read:
            # Where keys are normalised, none is a sum of others.
            self.splits = (1.0,) if self.qk_norm else READ_SPLITS
            if self.qk_norm and recipe.qk_rope_head_dim:
                raise InputError(
                    f"{config.model_type} normalises every key, so all of them are rotated whole. "
                    "Leave out --qk-rope-head-dim."
                )
            if recipe.qk_rope_head_dim is not None:
                self.splits = (recipe.qk_rope_head_dim / self.rotatable or 1.0,)
            if recipe.kv_lora_rank is not None:
                self.least = self.most = self.width
        elif self.rotatable:
            self.splits = TRIED_SPLITS

    @property
    def exact(self) -> bool:
        # Engines rotate every frequency once, which is less than there is.
        chosen = self.recipe.kv_lora_rank is None and self.recipe.qk_rope_head_dim is None
        return chosen and self.width >= self.budget.most and not self.engine

    def dims(self, width: int, share: float) -> LayerDims:
        if not self.on_read:
            beside = width - self.scales
            dims = split_width(beside, share, self.budget.rotatable, self.budget.rank)
            return replace(dims, scales=self.scales)
        # A component of each head's each frequency would be every key, in a dearer layout.
        rotated = 2 * round(share * self.rotatable / 2) if share < 1 else 0
        rank = min(width, self.budget.rank)
        return LayerDims(rank, min(rotated, rank // 2 * 2), on_read=True)

    def choose(self, error: Callable[[float], float]) -> float:
        if not self.on_read or len(self.splits) == 1:
            return super().choose(error)
        most = READ_MARGIN * error(1.0)
        return next((share for share in self.splits if error(share) <= most), 1.0)

    def moments(self, maps, x, generator) -> LatentMoments:
        if self.engine and (maps.q_bias is not None or maps.k_bias is not None):
            raise InputError(
                f"--preset engine has no place for the biases of this {self.config.model_type} "
                "model's queries and keys. Use --native, which transformers' own class holds."
            )
        return latent_moments(maps, x, generator, self.on_read)

    def builder(self, maps, moments) -> Callable[[LayerDims], LatentAttention]:
        return mla_builder(maps, moments)

    def finish(self, form, x, error, generator) -> LatentAttention:
        if self.engine:  # what is fitted afterwards makes up for the bias
            return replace(form, o_bias=None)
        return super().finish(form, x, error, generator)

    def asked(self, maps, moments) -> tuple[Components, Tensor] | None:
        if not self.recipe.native:
            return None
        return rope_components(maps, moments.phases), maps.inv_freq

    def shared(self, dims, asked) -> list[LayerDims]:
        if not self.recipe.native:
            return dims
        ranked = [components for components, _ in asked]
        count = dims[0].qk_rope_head_dim // 2
        if self.engine:
            pairs = standard_rope_pairs(ranked, count, asked[0][1])
        else:
            pairs = shared_rope_pairs(ranked, count)
        return [replace(dim, rope_pairs=pairs) for dim in dims]


class CodedMLATarget(LatentTarget):
    """MLA whose cached numbers have 0 to 8 bits each, dealt out over all layers.

    The importance of a number comes from a backward pass through the whole model (`channels`), so
    `moments` of one layer are None.
    """

    def __init__(self, config: PretrainedConfig, recipe: Recipe) -> None:
        super().__init__(config, recipe)
        asked = {
            "--kv-lora-rank": recipe.kv_lora_rank,
            "--qk-rope-head-dim": recipe.qk_rope_head_dim,
            "--preset": recipe.preset,
            "--native": recipe.native or None,
            "--uniform-rank": recipe.uniform or None,
        }
        for flag, value in asked.items():
            if value is not None:
                raise InputError(
                    f"{flag} asks for dims of 16-bit numbers, and --kv-bits {recipe.kv_bits} codes "
                    "them. Give --kv-bits 16, or leave one of the two out."
                )
        self.joint = self.on_read or not self.rotatable
        self.scales = 0 if self.joint else key_scales(config)
        self.allowed = CODED if recipe.kv_bits == "auto" else (int(recipe.kv_bits),)
        self.least = self.width
        self.most = self.source
        share = recipe.kv_budget
        self.bytes = 2 * (share * self.source - self.scales) * config.num_hidden_layers
        if self.bytes <= 0:
            raise self._too_small()

    @property
    def exact(self) -> bool:
        return False

    def dims(self, width: int, share: float) -> CodedDims:
        """Of a layer that has the mean of all bytes, as much of them in keys as in values.

        They are about what calibration gives: every channel has 4 bits, or 8 where bytes are left.
        """
        parts = 1 if self.joint else 2
        most = min(2 * self.keys, self.config.hidden_size) if self.joint else self.keys
        each = int(self.bytes / self.config.num_hidden_layers / parts)
        wide, pairs = 0, 0  # bytes of a channel of 8 bits, and of two of 4
        if 4 in self.allowed:
            pairs = max(2, min(each, most // 2) // 2 * 2)
            if 8 in self.allowed:
                more = min(max(0, each - pairs), pairs) // 2 * 2
                wide, pairs = 2 * more, pairs - more
        else:
            wide = max(2, min(each, most) // 2 * 2)
        left = max(0, most - wide - 2 * pairs)
        first = min(FIRST_CHANNELS, left) if self.recipe.exact_tokens else 0
        row = (wide, 0, 0, pairs, 0, 0)
        keys = (*row, first if self.joint else 0)
        return self._coded([Dealt(Code(keys)), Dealt(Code((*row, first)))][:parts])

    def _coded(self, codes: Sequence[Dealt]) -> CodedDims:
        values = Dealt() if self.joint else codes[1]
        exact = self.recipe.exact_tokens
        return CodedDims(codes[0], values, exact, not self.joint, self.scales)

    def moments(self, maps, x, generator) -> None:
        return None

    def transform(self, maps: AttentionMaps, moments: CodingMoments) -> Any:
        """One layer's transform, which measures its channels and builds the layer for any dims."""
        moments = in_precision(moments, maps.q.dtype)
        if self.joint:
            return JointTransform(maps, moments)
        return TurnedTransform.of(maps, moments)

    def builder(self, maps, moments) -> Callable[[CodedDims], LatentAttention]:
        return self.transform(maps, moments).build

    def channels(
        self, maps: AttentionMaps, moments: CodingMoments, seen: CodingTokens
    ) -> tuple[Channels, ...]:
        """What each channel of a layer's codes adds to the model's loss with each number of bits.

        Args:
            moments, seen: of `fisher_moments`.
        """
        step = max(1, len(seen.inputs) // CODED_TOKENS)
        few = in_precision(seen.every(step), maps.q.dtype)
        return self.transform(maps, moments).channels(few)

    def shared(self, dims, asked) -> list[CodedDims]:
        return [self._coded(codes) for codes in deal(asked, self.bytes, self.allowed)]

    def config_of(self, layers, fields) -> PretrainedConfig:
        codes = [[list(part) for part in layer.code or ()] for layer in layers]
        coded = {"cache_codes": codes, "exact_tokens": self.recipe.exact_tokens}
        return super().config_of(layers, fields | coded)


@dataclass(frozen=True)
class GQADims:
    """Every layer's KV heads, and the numbers they cache together."""

    num_key_value_heads: int
    width: int

    def bytes(self, itemsize: int) -> int:
        return self.width * itemsize

    def named(self) -> dict[str, int]:
        return {"num_key_value_heads": self.num_key_value_heads}


class GQATarget(Target):
    title = "grouped-query attention (GQA)"
    options = frozenset({"num_key_value_heads", "pooling"})
    classes = modeling.GQA_CLASSES
    stock = True

    def __init__(self, config: PretrainedConfig, recipe: Recipe) -> None:
        super().__init__(config, recipe)
        self.stock = is_stock(recipe.form, config)
        if recipe.pooling not in (None, *POOLINGS):
            raise InputError(f"--pooling {recipe.pooling} is unknown. Use {' or '.join(POOLINGS)}.")
        divisors = [n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0]
        count = self._count(divisors)
        if count not in divisors:
            raise InputError(
                f"--num-key-value-heads {count} does not divide the source's {self.kv_heads} KV "
                f"heads. Use one of {', '.join(map(str, divisors))}."
            )
        self.width = self.source // self.kv_heads * count
        self.least = self.most = self.width
        # Asked for by name, the mean of the GQA paper is what it is there.
        self.refits = recipe.pooling != "mean" or bool(recipe.heal)
        self.fixed = [GQADims(count, self.width)] * config.num_hidden_layers

    @property
    def exact(self) -> bool:
        return self.width == self.source

    def _count(self, divisors: list[int]) -> int:
        if self.recipe.num_key_value_heads is not None:
            return self.recipe.num_key_value_heads
        within = [n for n in divisors if n * 2 * self.head_dim <= self.width]
        if not within:
            raise InputError(
                f"--kv-budget {self.recipe.kv_budget:.2%} is less than one of the source's "
                f"{self.kv_heads} KV heads, {1 / self.kv_heads:.2%}. Give at least that, or use "
                "--to mla, which can go below."
            )
        return max(within)

    def dims(self, width: int, share: float) -> GQADims:
        return GQADims(width * self.kv_heads // self.source, width)

    def moments(self, maps, x, generator) -> GQAMoments | None:
        # What is pooled by the mean, or left as it is, asks no text.
        asks = self.recipe.pooling != "mean" and self.width < self.source
        return gqa_moments(maps, x, generator) if asks else None

    def builder(self, maps: AttentionMaps, moments: GQAMoments | None) -> Callable[[GQADims], GQA]:
        pooling = self.recipe.pooling or POOLINGS[0]
        return lambda dims: to_gqa(maps, moments, dims.num_key_value_heads, pooling)

    def config_of(self, layers, fields) -> PretrainedConfig:
        """The family's own class, that any engine loads, where it knows fewer KV heads."""
        if not self.stock:
            config_class, _, causal_lm = self.classes[self.config.model_type]
            return config_class(**fields | layers[0].dims, architectures=[causal_lm.__name__])
        # The stock class has one flag for biases, and the form has them where the source does.
        fields = {k: v for k, v in fields.items() if k not in ("q_bias", "k_bias", "o_bias")}
        fields.pop("v_bias", None)
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.config.model_type]
        return type(self.config)(**fields | layers[0].dims, architectures=[name])


class MQATarget(GQATarget):
    title = "multi-query attention (MQA)"
    options = frozenset({"pooling"})
    default_budget = 1.0

    def _count(self, divisors: list[int]) -> int:
        super()._count(divisors)  # a budget that was given must have room for one head
        return 1


class MFATarget(Target):
    title = "multi-matrix factorization attention (MFA)"
    options = frozenset({"head_dim", "share_q_dim", "qk_rope_head_dim"})
    classes = modeling.MFA_CLASSES
    key_reuse = False
    splits: Sequence[float] = (0.4, 0.6, 0.8)

    def __init__(self, config: PretrainedConfig, recipe: Recipe) -> None:
        super().__init__(config, recipe)
        self.caches = 1 if self.key_reuse else 2  # heads of width C
        self.scales = key_scales(config)
        self.least, self.most = 2 * self.caches + self.scales, self._widest() + self.scales
        head_dim, rotated = recipe.head_dim, recipe.qk_rope_head_dim
        if head_dim is None:
            widest = self.most if recipe.kv_budget == 1 else min(self.width, self.most)
            head_dim = (widest - self.scales) // (2 * self.caches) * 2
            if head_dim < 2:
                raise self._too_small()
        elif head_dim % 2 or not 2 <= head_dim <= self._widest() // self.caches:
            raise InputError(
                f"--head-dim {head_dim} must be even, at least 2 and at most "
                f"{self._widest() // self.caches}, beyond which nothing is gained."
            )
        self.width = self.caches * head_dim + self.scales
        rank, hidden = recipe.share_q_dim, config.hidden_size
        if rank is not None and not 1 <= rank <= min(hidden, self.heads * self.head_dim):
            raise InputError(
                f"share_q_dim={rank} must be at least 1 and at most "
                f"{min(hidden, self.heads * self.head_dim)}, the rank that the queries have."
            )
        most = min(head_dim, self.rotatable)
        if rotated is not None and (rotated % 2 or not 0 <= rotated <= most):
            raise InputError(
                f"--qk-rope-head-dim {rotated} must be even and at most {most}, what may be "
                "rotated of the key head."
            )
        if not self.rotatable or rotated is not None:
            self.splits = ((rotated or 0) / head_dim,)
        if self.width >= self.most:
            self.fixed = [self.dims(self.most, 1.0)] * config.num_hidden_layers
        elif recipe.head_dim is not None and rotated is not None:
            fixed = MFADims(head_dim, rotated, self.key_reuse, self.scales)
            self.fixed = [fixed] * config.num_hidden_layers

    def _widest(self) -> int:
        """From here on nothing is lost: all that is rotated, all other keys, and all values."""
        free = min(self.keys - self.rotatable, self.config.hidden_size)
        return 2 * (self.rotatable + free + free % 2)

    def dims(self, width: int, share: float) -> MFADims:
        head_dim = (min(width, self.most) - self.scales) // (2 * self.caches) * 2
        rotated = min(2 * round(share * head_dim / 2), self.rotatable, head_dim)
        return MFADims(head_dim, rotated, self.key_reuse, self.scales)

    def moments(self, maps, x, generator) -> LatentMoments:
        return latent_moments(maps, x, generator, rope_on_read=False)

    def builder(self, maps, moments) -> Callable[[MFADims], LatentAttention]:
        return (mfa_kr_builder if self.key_reuse else mfa_builder)(maps, moments)

    def finish(self, form, x, error, generator) -> LatentAttention:
        heads, width, hidden = form.q.shape
        if self.qk_norm:  # normalised queries are no linear map that could have a rank
            return form
        asked = self.recipe.share_q_dim

        def rank(energy: Tensor) -> int | None:
            """The smallest at which the error stays what it is, where that saves weights."""
            if asked is not None:
                return min(asked, heads * width)  # of rows that are narrower, all there is
            total = energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
            left = energy.flip(0).cumsum(0).flip(0) / total
            least = max(1, int((left > QUERY_SHARE * error).sum()))
            smaller = least * (heads * width + hidden) < heads * width * hidden
            return least if smaller else None

        if asked is not None or error >= ROUNDING:  # an exact layer stays so, on any text
            form = with_low_rank_queries(form, x, generator, rank, "share_q_dim")
        # A low rank makes a bias, and a config has one flag for all layers.
        return (
            form
            if form.q_bias is not None
            else replace(form, q_bias=form.q.new_zeros(heads, width))
        )

    def settled(self, form, x) -> LatentAttention:
        return form.stored(x)

    def named(self, form, dims: Dims) -> dict[str, int]:
        rank = 0 if form.q_down is None else len(form.q_down)
        return dims.named() | {"share_q_dim": rank}

    def config_of(self, layers, fields) -> PretrainedConfig:
        config_class, _, causal_lm = self.classes[self.config.model_type]
        names = {"head_dim": "mfa_head_dim", "qk_rope_head_dim": None, "share_q_dim": None}
        widths = _per_layer(layers, names)
        return config_class(
            **fields,
            **widths | {"share_q_dim": widths["share_q_dim"] or None},
            rope_pairs=[list(layer.rope_pairs) for layer in layers],
            key_reuse=self.key_reuse,
            qk_norm=bool(self.qk_norm),
            architectures=[causal_lm.__name__],
        )


class MFAKRTarget(MFATarget):
    title = "multi-matrix factorization attention with key reuse (MFA-KR)"
    key_reuse = True
    splits = TRIED_SPLITS

    def _widest(self) -> int:
        """All that is rotated, and directions for the rest, or for the whole input."""
        free = min(2 * self.keys - self.rotatable, self.config.hidden_size)
        return self.rotatable + free + free % 2


TARGETS: dict[str, type[Target]] = {
    "gqa": GQATarget,
    "mqa": MQATarget,
    "mla": MLATarget,
    "mfa": MFATarget,
    "mfa-kr": MFAKRTarget,
}


def is_stock(form: str, config: PretrainedConfig) -> bool:
    """Whether the family's own class holds a form."""
    return TARGETS[form].stock and hasattr(config, "num_key_value_heads")


def target_of(config: PretrainedConfig, recipe: Recipe) -> Target:
    """The recipe's form for this model.

    Raises:
        InputError: the form does not know one of the recipe's options, or they cannot be met.
    """
    if recipe.preset not in (None, *PRESETS):
        raise InputError(f"--preset {recipe.preset} is unknown. Use {' or '.join(PRESETS)}.")
    target = TARGETS[recipe.form]
    known = frozenset().union(*(t.options for t in TARGETS.values()))
    for name in sorted(known - target.options):
        if getattr(recipe, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            forms = ", ".join(form for form, t in TARGETS.items() if name in t.options)
            raise InputError(f"{flag} means nothing to {recipe.form}. It belongs to {forms}.")
    if recipe.form != "mla" and (recipe.native or recipe.rope != "decoupled"):
        flag = "--native" if recipe.native else f"--rope {recipe.rope}"
        flag = f"--preset {recipe.preset}" if recipe.preset else flag
        raise InputError(f"{flag} means nothing to {recipe.form}. It belongs to mla.")
    if recipe.kv_bits != "16":
        if recipe.form != "mla":
            raise InputError(
                f"--kv-bits {recipe.kv_bits} means nothing to {recipe.form}. It belongs to mla."
            )
        target = CodedMLATarget
    return target(config, recipe)


def _check_heads(config: PretrainedConfig) -> None:
    """Raises unless there are layers, and heads that can share and rotate."""
    layers, heads, groups = config.num_hidden_layers, config.num_attention_heads, kv_heads(config)
    if layers < 1:
        raise InputError(f"config.json asks for {layers} layers: there is nothing to convert.")
    if heads < 1 or groups < 1 or heads % groups:
        raise InputError(
            f"config.json asks for {heads} query heads on {groups} KV heads, which cannot share "
            "them evenly."
        )
    width = head_dim(config)
    if width < 2 or width % 2:
        raise InputError(
            f"config.json asks for heads of width {width}. Rotary embedding turns pairs, so it "
            "must be even."
        )


def _per_layer(
    layers: Sequence[LayerReport], names: dict[str, str | None]
) -> dict[str, int | list[int] | None]:
    """Each of the layers' dims as the largest and, where they differ, a list.

    Args:
        names: a dim's name -> its name in the config, None for the same.
    """
    fields: dict[str, int | list[int] | None] = {}
    for dim, name in names.items():
        values = [layer.dims[dim] for layer in layers]
        fields[name or dim] = max(values)
        fields[f"{name or dim}_per_layer"] = None if len(set(values)) == 1 else values
    return fields
