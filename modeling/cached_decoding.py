"""Decoding through a cache: its names in transformers, and whether what is decoded is right.

transformers renamed the argument that carries the cache from layer to attention in 5.24. An
attention that lets an unknown argument pass then decodes every token from itself alone, without a
word. So an attention refuses a cache under a name it does not know, and where a library is newer
than what these classes were tested on, a tiny model is decoded with and without a cache.
"""

import inspect
from functools import cache as once
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Cache

# The newest releases that these classes were tested on.
TESTED = {"transformers": "5.24.0", "torch": "2.13.0"}
# The argument's name from transformers 5.24 on, the one until then, and GPT-NeoX's.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
# Relative distance of logits in float32; those of a cache that is not used are off by about 1.
ROUNDING = 1e-3


class WrongDecoding(RuntimeError):
    """Logits through the cache are not those without: the installed libraries do not fit."""


def take_cache(owner: str, cache: Any, kwargs: dict[str, Any]) -> Any:
    """The cache among an attention's arguments, taken out of `kwargs`; None if there is none.

    Args:
        owner: the name of the attention's class, for errors.
        cache: the argument `cache`.
        kwargs: the arguments that the attention has no parameter for.

    Raises:
        TypeError: an argument of another name holds a cache, or two of them hold different ones.
    """
    for name in CACHE_NAMES[1:]:
        other = kwargs.pop(name, None)
        if other is None:
            continue
        if cache is not None and other is not cache:
            raise TypeError(f"{owner} was handed two caches, one of them as `{name}`. Give one.")
        cache = other
    for name, value in kwargs.items():
        if _holds_cache(value):
            raise TypeError(
                f"{owner} was handed a cache as `{name}`, which it does not know and would not "
                f"use. {remedy()}"
            )
    return cache


def update_cache(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all cached tokens, the new ones among them.

    The cache of `generate_batch` adds to `kwargs` what its attention functions need; until
    transformers 5.22 those functions update it themselves.
    """
    paged = not isinstance(cache, Cache) and not hasattr(cache, "get_seq_length")
    if paged and "kwargs" not in inspect.signature(cache.update).parameters:
        kwargs["cache"] = cache
        return key, value
    return cache.update(key, value, layer_idx, kwargs=kwargs)


def cache_argument(model: Any) -> str:
    """The name by which a model, or one of its layers, takes a cache."""
    taken = inspect.signature(model.forward).parameters
    renamed = Version(transformers.__version__) >= Version("5.24.0.dev0")
    usual = CACHE_NAMES[0] if renamed else CACHE_NAMES[1]  # of a wrapper, which names none
    return next((name for name in CACHE_NAMES if name in taken), usual)


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where it has none."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def newer_than_tested() -> dict[str, str]:
    """Installed versions, by library, that are newer than the newest that was tested."""
    installed = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {
        name: version
        for name, version in installed.items()
        if Version(Version(version).public) > Version(TESTED[name])
    }


def check_if_newer(model_class: type) -> None:
    """Decodes a tiny model of a converted class where a library is newer than tested.

    It takes milliseconds, and is done once for a class.

    Raises:
        WrongDecoding: logits through the cache are not those without.
    """
    if newer_than_tested():
        check_decoding(model_class)


@once
@torch.no_grad()
def check_decoding(model_class: type) -> None:
    """Decodes tiny models of a converted class, one for each of its layouts.

    Raises:
        WrongDecoding: logits through the cache are not those without.
    """
    for config in model_class.config_class.tiny():
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            model = model_class(config).float().eval()
        ids = torch.arange(12)[None] % config.vocab_size
        off = distance(decoded(model, ids, (7, 1, 1, 3)), model(ids, use_cache=False)[0])
        if not off < ROUNDING:
            raise WrongDecoding(
                f"{model_class.__name__} decodes wrongly with transformers "
                f"{transformers.__version__} and torch {torch.__version__}: through the cache its "
                f"output is {off:.2g} of its size away from what it is without. {remedy()}"
            )


def decoded(model: Any, ids: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The first output [B, T, ...] of tokens [B, T] given in pieces of these sizes with a cache."""
    outputs: list[torch.Tensor] = []
    given: dict[str, Any] = {}
    for piece in ids.split(sizes, dim=1):
        out = model(piece, use_cache=True, **given)
        given = {cache_argument(model): cache_of(out)}
        outputs.append(out[0])
    return torch.cat(outputs, dim=1)


def distance(found: torch.Tensor, meant: torch.Tensor) -> float:
    """The norm of the difference, relative to that of `meant`."""
    found, meant = found.double(), meant.double()
    return float((found - meant).norm() / meant.norm().clamp_min(1e-12))


def _holds_cache(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(map(_holds_cache, value.values() if isinstance(value, dict) else value))
    # Not all of transformers' caches have the base class.
    return isinstance(value, Cache) or type(value).__name__.endswith("Cache")


def remedy() -> str:
    """Which versions were tested, which are installed, and what to do."""
    tested = " and ".join(f"{name} {version}" for name, version in TESTED.items())
    return (
        f"It was tested up to {tested}; transformers {transformers.__version__} and torch "
        f"{torch.__version__} are installed. Upgrade rehead and convert again, or run pip install "
        f"transformers=={TESTED['transformers']}."
    )
