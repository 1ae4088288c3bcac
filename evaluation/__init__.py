"""What a model is worth: perplexity, the bytes of its cache, its capacity, and what it says.

Importing this package makes rehead's own model classes known to transformers.
"""

from .cache import cache_bytes_of_config, exact_bytes, kv_bytes_per_token
from .capacity import Capacity, capacity, parameter_counts
from .comparison import Comparison, Measured, compare, comparison_windows
from .generation import continuation, own_texts
from .loading import load_config, load_model, load_tokenizer
from .perplexity import Perplexity, perplexity
from .report import check_report, report_page, write_report

__all__ = [
    "Capacity",
    "Comparison",
    "Measured",
    "Perplexity",
    "cache_bytes_of_config",
    "capacity",
    "check_report",
    "compare",
    "comparison_windows",
    "continuation",
    "exact_bytes",
    "kv_bytes_per_token",
    "load_config",
    "load_model",
    "load_tokenizer",
    "own_texts",
    "parameter_counts",
    "perplexity",
    "report_page",
    "write_report",
]
