"""The recipe in the Trainer's words, and the processes that share a run."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..converters.errors import InputError
from .config import UptrainConfig
from .work import Work


def trainer_arguments(
    config: UptrainConfig, work: Work, output: Path, device: torch.device, report_to: str
) -> TrainingArguments:
    """The Trainer's settings for a run that writes into its work folder."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    share, rest = divmod(config.batch, world)
    micro = min(config.micro_batch, share)
    if rest or not micro or share % micro:
        raise InputError(
            f"--batch {config.batch} is not divided by {world} processes of --micro-batch "
            f"{config.micro_batch} windows at a time. Make it a multiple of {world} * "
            f"{config.micro_batch}."
        )
    if report_to != "none":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output) + "-logs")
    try:
        arguments = TrainingArguments(
            output_dir=str(work.folder),
            run_name=output.name,
            max_steps=config.steps,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=share // micro,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_steps,
            weight_decay=0.0,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=config.dtype == "bfloat16",
            use_cpu=device.type == "cpu",
            seed=config.seed,
            data_seed=config.seed,
            eval_strategy="steps",
            eval_steps=config.every,
            eval_on_start=work.checkpoint is None,
            save_strategy="steps",
            save_steps=config.every,
            # The newest may be cut short by a kill while it is written.
            save_total_limit=2,
            logging_steps=max(1, config.steps // 200),
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to=[report_to],
            remove_unused_columns=False,
            label_names=[],
            dataloader_pin_memory=device.type == "cuda",
            ddp_find_unused_parameters=False,
            ddp_backend="gloo" if device.type == "cpu" and world > 1 else None,
        )
        # One process uses one device; it would otherwise spread over all it sees.
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1
        return arguments
    except (ImportError, ValueError) as error:
        raise InputError(f"the Trainer cannot be set up so: {error}") from error


@contextlib.contextmanager
def memory_explained(arguments: TrainingArguments) -> Iterator[None]:
    """Out of memory as one line that names the flag to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error).lower()
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(word in text for word in words):
            raise
        micro = arguments.per_device_train_batch_size
        advice = f"Lower --micro-batch, {micro} windows at a time now; the result stays the same."
        if micro == 1:
            advice = "--micro-batch is 1 already: lower --window, or --rank, or leave --full out."
        raise InputError(f"out of memory on {arguments.device}. {advice}") from error


def sharded() -> bool:
    """Whether accelerate was launched to spread the weights over processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def wait_for_all(arguments: TrainingArguments) -> None:
    if arguments.world_size > 1:
        torch.distributed.barrier()
