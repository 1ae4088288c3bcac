"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

from . import GQA_CLASSES

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Has vLLM run rehead's GQA classes by its Transformers backend, without `trust_remote_code`.

    Importing this module has registered every class with the Auto classes. MLA and MFA are left
    out, for that backend knows no cache of their widths: MLA is exported to a stock class instead.
    """
    try:
        from vllm import ModelRegistry
    except ImportError:
        return
    for _, _, causal_lm in GQA_CLASSES.values():
        ModelRegistry.register_model(causal_lm.__name__, BACKEND)
