"""What a model is worth: perplexity, the bytes of its cache, its capacity, and what it says.

Importing this package makes rehead's own model classes known to transformers.
"""

from .cache import cache_bytes_of_config, kv_bytes_per_token
from .capacity import Capacity, capacity, parameter_counts
from .generation import continuation
from .loading import load_config, load_model, load_tokenizer
from .perplexity import Perplexity, perplexity

__all__ = [
    "Capacity",
    "Perplexity",
    "cache_bytes_of_config",
    "capacity",
    "continuation",
    "kv_bytes_per_token",
    "load_config",
    "load_model",
    "load_tokenizer",
    "parameter_counts",
    "perplexity",
]
