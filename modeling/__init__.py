"""Hugging Face classes of the converted forms, registered with the Auto classes on import."""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .gqa import GQAAttention
from .mfa import MFAAttention
from .mla import MLAAttention

# By the source's model_type, which is also the name of the module: what its classes' names begin
# with. A family's classes are <Family><Form>Config, ...Model and ...ForCausalLM.
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "phi3": "Phi3",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "stablelm": "StableLm",
    "phi": "Phi",
    "gpt_neox": "GPTNeoX",
    "olmo": "Olmo",
    "gemma": "Gemma",
    "gpt2": "GPT2",
    "opt": "OPT",
    "seed_oss": "SeedOss",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "gemma3_text": "Gemma3",
    "gemma2": "Gemma2",
    "olmoe": "Olmoe",
    "starcoder2": "Starcoder2",
}

Classes = tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]


def _classes(form: str) -> dict[str, Classes]:
    """By the source's model_type: config, model, model with a language head."""
    found = {}
    for family, prefix in FAMILIES.items():
        module = import_module(f".{family}", __name__)
        if not hasattr(module, f"{prefix}{form}Config"):
            continue  # GQA where the family's own class holds it, and what its norms do not allow
        config, model, causal_lm = (
            getattr(module, f"{prefix}{form}{kind}") for kind in ("Config", "Model", "ForCausalLM")
        )
        found[family] = config, model, causal_lm
    return found


MLA_CLASSES = _classes("MLA")
MFA_CLASSES = _classes("MFA")
GQA_CLASSES = _classes("GQA")
_ALL = (*MLA_CLASSES.values(), *MFA_CLASSES.values(), *GQA_CLASSES.values())

VLLM_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register_in_vllm() -> None:
    """Has vLLM run rehead's GQA classes by its Transformers backend, without `trust_remote_code`.

    vLLM calls it in each of its processes, by the entry point `vllm.general_plugins`. MLA and MFA
    are left out, for that backend knows no cache of their widths.
    """
    try:
        from vllm import ModelRegistry
    except ImportError:
        return
    for _, _, causal_lm in GQA_CLASSES.values():
        ModelRegistry.register_model(causal_lm.__name__, VLLM_BACKEND)


# The linear layers of every form's attention, for peft's LoraConfig(target_modules=...).
_STOCK = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA_TARGET_MODULES = {
    "gqa": _STOCK,
    "mqa": _STOCK,
    "mla": ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "mfa": ["q_proj", "wq", "k_proj", "v_proj", "o_proj"],
    "mfa-kr": ["q_proj", "wq", "k_proj", "kr_proj", "o_proj"],
}

__all__ = ["GQA_CLASSES", "LORA_TARGET_MODULES", "MFA_CLASSES", "MLA_CLASSES", "register_in_vllm"]
__all__ += ["GQAAttention", "MFAAttention", "MLAAttention"]

for _config, _model, _causal_lm in _ALL:
    for _class in (_config, _model, _causal_lm):
        globals()[_class.__name__] = _class
        __all__ += [_class.__name__]
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)
    # save_pretrained then copies the code beside the weights.
    _config.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")
