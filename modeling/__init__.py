"""Hugging Face classes of the converted forms, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .llama_mfa import LlamaMFAConfig, LlamaMFAForCausalLM, LlamaMFAModel
from .llama_mla import LlamaMLAConfig, LlamaMLAForCausalLM, LlamaMLAModel
from .mfa import MFAAttention
from .mistral_mfa import MistralMFAConfig, MistralMFAForCausalLM, MistralMFAModel
from .mistral_mla import MistralMLAConfig, MistralMLAForCausalLM, MistralMLAModel
from .mla import MLAAttention
from .qwen2_mfa import Qwen2MFAConfig, Qwen2MFAForCausalLM, Qwen2MFAModel
from .qwen2_mla import Qwen2MLAConfig, Qwen2MLAForCausalLM, Qwen2MLAModel

__all__ = [
    "LORA_TARGET_MODULES",
    "MFA_CLASSES",
    "MLA_CLASSES",
    "LlamaMFAConfig",
    "LlamaMFAForCausalLM",
    "LlamaMFAModel",
    "LlamaMLAConfig",
    "LlamaMLAForCausalLM",
    "LlamaMLAModel",
    "MFAAttention",
    "MLAAttention",
    "MistralMFAConfig",
    "MistralMFAForCausalLM",
    "MistralMFAModel",
    "MistralMLAConfig",
    "MistralMLAForCausalLM",
    "MistralMLAModel",
    "Qwen2MFAConfig",
    "Qwen2MFAForCausalLM",
    "Qwen2MFAModel",
    "Qwen2MLAConfig",
    "Qwen2MLAForCausalLM",
    "Qwen2MLAModel",
]

# By the source's model_type: config, model, model with a language head.
MLA_CLASSES = {
    "llama": (LlamaMLAConfig, LlamaMLAModel, LlamaMLAForCausalLM),
    "mistral": (MistralMLAConfig, MistralMLAModel, MistralMLAForCausalLM),
    "qwen2": (Qwen2MLAConfig, Qwen2MLAModel, Qwen2MLAForCausalLM),
}
MFA_CLASSES = {
    "llama": (LlamaMFAConfig, LlamaMFAModel, LlamaMFAForCausalLM),
    "mistral": (MistralMFAConfig, MistralMFAModel, MistralMFAForCausalLM),
    "qwen2": (Qwen2MFAConfig, Qwen2MFAModel, Qwen2MFAForCausalLM),
}

# The linear layers of every form's attention, for peft's LoraConfig(target_modules=...).
_STOCK = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA_TARGET_MODULES = {
    "gqa": _STOCK,
    "mqa": _STOCK,
    "mla": ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "mfa": ["q_proj", "wq", "k_proj", "v_proj", "o_proj"],
    "mfa-kr": ["q_proj", "wq", "k_proj", "kr_proj", "o_proj"],
}

for _config, _model, _causal_lm in (*MLA_CLASSES.values(), *MFA_CLASSES.values()):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)
    # save_pretrained then copies the code beside the weights.
    _config.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")
