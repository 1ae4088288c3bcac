"""Hugging Face classes of the converted forms, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .families import FAMILIES, FORMS, Classes, converted
from .gqa import GQAAttention
from .mfa import MFAAttention
from .mla import MLAAttention

# By form, then by the source's model_type: config, model, model with a language head. A family has
# no GQA classes where its own hold GQA, and no classes of a form that its norms do not allow.
CLASSES: dict[str, dict[str, Classes]] = {
    name: {family: converted(family, name) for family, row in FAMILIES.items() if form.serves(row)}
    for name, form in FORMS.items()
}
MLA_CLASSES, MFA_CLASSES, GQA_CLASSES = (CLASSES[form] for form in ("MLA", "MFA", "GQA"))

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
_QUERIES = ["q_proj", "q_a_proj", "q_b_proj"]
LORA_TARGET_MODULES = {
    "gqa": _STOCK,
    "mqa": _STOCK,
    "mla": [*_QUERIES, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "mfa": [*_QUERIES, "k_proj", "v_proj", "k_b_proj", "v_b_proj", "o_proj"],
    "mfa-kr": [*_QUERIES, "k_proj", "k_b_proj", "v_b_proj", "o_proj"],
}

__all__ = ["CLASSES", "GQA_CLASSES", "LORA_TARGET_MODULES", "MFA_CLASSES", "MLA_CLASSES", "Classes"]
__all__ += ["GQAAttention", "MFAAttention", "MLAAttention", "register_in_vllm"]

for _config, _model, _causal_lm in (row for form in CLASSES.values() for row in form.values()):
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
