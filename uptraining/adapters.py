"""What is trained: an adapter on some linear layers, or those layers themselves."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..converters.errors import InputError, one_line
from .config import UptrainConfig
from .states import attention_modules

ADAPTER = "default"


def add_trained(model: Any, config: UptrainConfig) -> Any:
    """The model with its target made trainable: wrapped by peft, or with `full` as it is.

    Raises:
        InputError: the target is no part of the model.
    """
    model.requires_grad_(False)
    names = target_names(model, config.target)
    if config.full:
        for name in names:
            model.get_submodule(name).requires_grad_(True)
        if config.target in ("attention", "all-linear"):
            # What attention holds beside its linear layers: the factors of its queries, and biases.
            for _, module in attention_modules(model):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
        return model
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=_as_peft_says(config.target, names),
        use_dora=config.dora,
        use_rslora=config.rslora,
        init_lora_weights="pissa" if config.pissa else True,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"peft refuses this adapter: {one_line(error)}") from error


def target_names(model: Any, target: str) -> list[str]:
    """The names of the linear layers that `target` means."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = model.get_output_embeddings()
    if target == "attention":
        prefixes = tuple(f"{name}." for name, _ in attention_modules(model))
        found = [name for name in layers if prefixes and name.startswith(prefixes)]
    elif target == "all-linear":
        found = [name for name, layer in layers.items() if layer is not head]
    else:
        found = [name for name in layers if _matches(target, name)]
        if any(layers[name] is head for name in found):
            raise InputError(f"--target {target} matches the head, which is not trained.")
    if not found:
        example = next((name for name in layers if layers[name] is not head), "none")
        raise InputError(
            f"--target {target} matches no linear layer. Give attention, all-linear, or a regex "
            f"for whole names such as {example}."
        )
    return found


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise InputError(f"--target {pattern} is no regular expression: {error}.") from error


def _as_peft_says(target: str, names: list[str]) -> list[str] | str:
    """peft's own words for the target, which stand in adapter_config.json."""
    if target == "attention":
        return sorted({name.split(".")[-1] for name in names})
    return target


def adapted_names(model: PeftModel) -> list[str]:
    """The names, in the model without adapters, of the layers that have one."""
    base = model.get_base_model()
    return [name for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)]


def keep_start(model: PeftModel, folder: Path) -> None:
    """Saves a PiSSA adapter as it starts: it is subtracted from the trained one in the end.

    PiSSA takes the adapter's start out of the weight. What is saved has to fit the weight that is
    on disk, so peft writes the difference of the two products, of twice the rank.
    """
    settings = model.peft_config[ADAPTER]
    start, settings.init_lora_weights = settings.init_lora_weights, True
    model.save_pretrained(folder)
    settings.init_lora_weights = start


def save_adapter(
    model: PeftModel, folder: Path, *, start: Path | None, state: dict[str, torch.Tensor] | None
) -> None:
    """Writes the adapter so that `PeftModel.from_pretrained` puts it on the model it came from.

    Args:
        start: the folder of `keep_start`, for PiSSA.
        state: the weights, where they have to be collected from several processes.
    """
    options: dict[str, Any] = (
        {} if start is None else {"path_initial_model_for_weight_conversion": str(start)}
    )
    if state is not None:
        options["state_dict"] = state
    model.save_pretrained(folder, save_embedding_layers=False, **options)


@torch.no_grad()
def merged_weights(base: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """name -> float32 weight of every layer that the adapter changes, merged by peft.

    Args:
        base: the model that the adapter was trained on; it is used up.

    Raises:
        InputError: the adapter holds something that is not a number.
    """
    model = PeftModel.from_pretrained(base, str(adapter))
    names = adapted_names(model)
    for name in names:
        model.get_base_model().get_submodule(name).get_base_layer().float()
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(f"the adapter cannot be merged: {one_line(error)}") from error
    return {f"{name}.weight": merged.get_submodule(name).weight.detach() for name in names}
