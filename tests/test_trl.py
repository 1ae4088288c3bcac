"""TRL's trainer on a converted model: the adapters of every linear layer of its attention learn."""

import folders
import pytest
import tiny
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehead.modeling import LORA_TARGET_MODULES

MODELS = {
    "mla": lambda: tiny.mla(**folders.MODEL_FIELDS),
    "mfa-kr": lambda: tiny.mfa(form="mfa_kr", **folders.MODEL_FIELDS),
}


@pytest.mark.parametrize("form", MODELS)
def test_two_steps_of_supervised_finetuning(form, tmp_path):
    folders.save(tmp_path / "in", MODELS[form]())
    options = dict(
        bf16=False, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, max_length=64
    )
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "in", device_map="auto"),
        args=trl.SFTConfig(str(tmp_path / "run"), report_to=[], save_strategy="no", **options),
        train_dataset=Dataset.from_dict({"text": ["the tree sees the sea"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "in"),
        peft_config=LoraConfig(r=4, target_modules=LORA_TARGET_MODULES[form]),
    )
    trainer.train()
    learned = {
        name.split(".")[-4]: float(parameter.detach().abs().max())
        for name, parameter in trainer.model.named_parameters()
        if "lora_B" in name
    }
    linear = {"mla": {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}}
    linear["mfa-kr"] = {"q_proj", "k_proj", "k_b_proj", "v_b_proj", "o_proj"}
    assert set(learned) == linear[form]
    assert min(learned.values()) > 0  # zero before the first step
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged.eval()(ids).logits)
