"""The cache that a conversion may use."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from .errors import InputError
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
        fixed: the dims of every layer where they were given, not to be chosen.
    """

    source: int
    width: int
    rotatable: int
    rank: int
    fixed: list[LayerDims] | None

    @classmethod
    def of(cls, config: PretrainedConfig, recipe: Recipe) -> "Budget":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = config.num_key_value_heads * head
        on_read = recipe.rope == "on-read"
        # Engines rotate every frequency once.
        rotatable = 0 if on_read else head if recipe.preset == "engine" else keys
        rank = min(2 * keys, config.hidden_size)
        budget = cls(
            source=2 * keys,
            width=int(recipe.kv_budget * 2 * keys + 1e-9),
            rotatable=rotatable,
            rank=rank,
            fixed=None,
        )
        fixed = budget._explicit(recipe)
        everything = LayerDims(rank) if on_read else LayerDims(min(keys, rank), keys)
        exact = on_read or rotatable == keys
        if fixed is None and exact and budget.width >= everything.width:
            fixed = everything
        if fixed is None:
            if budget.width < (1 if on_read else 3):
                raise InputError(
                    f"--kv-budget {recipe.kv_budget:.2%} leaves {budget.width} of the "
                    f"{2 * keys} numbers cached per token and layer. Give a larger one."
                )
            return budget
        layers = [fixed] * config.num_hidden_layers
        return cls(budget.source, fixed.width, budget.rotatable, rank, layers)

    def _explicit(self, recipe: Recipe) -> LayerDims | None:
        rank, rotated = recipe.kv_lora_rank, recipe.qk_rope_head_dim
        if rank is None:
            if rotated is None:
                return None
            rank = self.width - rotated
        elif rotated is None:
            rotated = 2 * (min(max(self.width - rank, 0), self.rotatable) // 2)
        if rotated % 2 or rotated > self.rotatable:
            why = "what --preset engine rotates" if recipe.preset else "the width of all key heads"
            raise InputError(
                f"qk_rope_head_dim={rotated} must be even and at most {self.rotatable}, {why}"
                f"{' (0 with --rope on-read)' if not self.rotatable else ''}."
            )
        most = min(self.source - rotated, self.rank)
        if not 1 <= rank <= most:
            raise InputError(
                f"kv_lora_rank={rank} with qk_rope_head_dim={rotated} is not between 1 and {most}, "
                "beyond which nothing is gained. Use at most that, or give --kv-budget."
            )
        return LayerDims(rank, rotated)
