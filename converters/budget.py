"""The cache that a conversion may use."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from .errors import InputError
from .families import FAMILIES, head_dim, kv_heads
from .plan import LayerDims
from .recipe import Recipe


@dataclass(frozen=True)
class Budget:
    """The cache a conversion may use, in numbers per token and layer.

    Args:
        source: width of the source's cache.
        width: mean width of the converted cache.
        rotatable: dims that may be rotated, at most.
        rank: the rank from which on the latent is exact.
        most: the width from which on nothing is gained.
        fixed: the dims of every layer where they were given, not to be chosen.
    """

    source: int
    width: int
    rotatable: int
    rank: int
    most: int
    fixed: list[LayerDims] | None

    @classmethod
    def of(cls, config: PretrainedConfig, recipe: Recipe) -> "Budget":
        groups, on_read = kv_heads(config), recipe.rope == "on-read"
        keys = groups * head_dim(config)
        rotated = FAMILIES[config.model_type].rotary_dim(config)
        # Engines rotate every frequency once.
        rotatable = rotated if recipe.preset == "engine" else groups * rotated
        rank = min(2 * keys, config.hidden_size)
        # What is not rotated shares the latent with the values.
        scales = 0 if on_read else key_scales(config)
        split = LayerDims(min(2 * keys - rotatable, rank), rotatable, scales=scales)
        everything = LayerDims(rank, on_read=True) if on_read else split
        budget = cls(
            source=2 * keys,
            width=_width(recipe, 2 * keys),
            rotatable=rotatable,
            rank=rank,
            most=everything.width,
            fixed=None,
        )
        fixed = budget._explicit(recipe, scales)
        exact = on_read or rotatable == groups * rotated
        # All of the cache is asked for: what scales keys is beside it.
        whole = recipe.kv_budget == 1 and recipe.kv_lora_rank is None
        if fixed is None and exact and (whole or budget.width >= everything.width):
            fixed = everything
        if fixed is None:
            if budget.width < (1 if on_read or not rotatable else 3) + scales:
                raise InputError(
                    f"--kv-budget {recipe.kv_budget:.2%} leaves {budget.width} of the "
                    f"{2 * keys} numbers cached per token and layer. Give a larger one."
                )
            return budget
        layers = [fixed] * config.num_hidden_layers
        return replace(budget, width=fixed.width, fixed=layers)

    def _explicit(self, recipe: Recipe, scales: int) -> LayerDims | None:
        rank, rotated = recipe.kv_lora_rank, recipe.qk_rope_head_dim
        on_read = recipe.rope == "on-read"
        if rotated is not None and (rotated % 2 or rotated > self.rotatable):
            why = "what --preset engine rotates"
            if not recipe.preset:
                why = "the rotated width of all key heads"
            raise InputError(
                f"qk_rope_head_dim={rotated} must be even and at most {self.rotatable}, {why}."
            )
        if on_read and (rank is None or rotated is None):
            # What the one leaves open is measured.
            self._check_rank(rank, 0)
            return None
        if rank is None:
            if rotated is None:
                return None
            rank = self.width - scales - rotated
        elif rotated is None:
            rotated = 2 * (min(max(self.width - scales - rank, 0), self.rotatable) // 2)
        self._check_rank(rank, 0 if on_read else rotated)
        if on_read and rotated > rank:
            raise InputError(
                f"qk_rope_head_dim={rotated} must be at most kv_lora_rank={rank}: on-read, the "
                "rotated key is a part of the latent. Give 0 to rotate every key whole."
            )
        return LayerDims(rank, rotated, on_read=on_read, scales=scales)

    def _check_rank(self, rank: int | None, rotated: int) -> None:
        """Raises unless a rank beside so many rotated dims, 0 if they are a part of it, fits."""
        most = min(self.source - rotated, self.rank)
        if rank is not None and not 1 <= rank <= most:
            beside = f" with qk_rope_head_dim={rotated}" if rotated else ""
            raise InputError(
                f"kv_lora_rank={rank}{beside} is not between 1 and {most}, beyond which nothing is "
                "gained. Use at most that, or give --kv-budget."
            )


def key_scales(config: PretrainedConfig) -> int:
    """Numbers that a token caches to scale its keys by, where the family normalises them."""
    norm = FAMILIES[config.model_type].qk_norm
    return {"head": kv_heads(config), "all": 1, None: 0}[norm]


def _width(recipe: Recipe, source: int) -> int:
    if recipe.rope == "on-read" and recipe.kv_lora_rank is not None:
        return recipe.kv_lora_rank
    return int(recipe.kv_budget * source + 1e-9)
