"""Uptraining: what a conversion cost in quality is trained back."""

import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments, set_seed

from ..converters.checkpoint import Source, locate, open_source
from ..converters.errors import InputError
from ..converters.healing import has_fast_bfloat16
from ..converters.memory import peak_rss_bytes
from ..evaluation import load_model, load_tokenizer
from .adapters import ADAPTER, add_trained, keep_start, merged_weights, save_adapter
from .arguments import memory_explained, sharded, trainer_arguments, wait_for_all
from .config import HeldOut, UptrainConfig, Uptraining
from .data import Prepared, prepare
from .distiller import Distiller, Interrupted, Progress, Report, Stop
from .precision import (
    attention_implementation,
    settle,
    training_device,
    without_denormals,
)
from .saving import check_place, write_adapter, write_model
from .teacher import Teacher, check_same_tokens, load_teacher
from .work import Work, work_of

FORMS = ("merged", "adapter")


def uptrain(
    config: UptrainConfig,
    *,
    output: str | Path,
    form: str = "merged",
    resume: bool = False,
    force: bool = False,
    device: str | None = None,
    report_to: str = "none",
    progress: Progress | None = None,
) -> Uptraining:
    """Trains a checkpoint's attention towards a teacher, and writes the result.

    Run under `accelerate launch`, every process calls this; the batch is shared among them and the
    first one writes.

    Args:
        output: the folder to write. While the run lasts, `.NAME.uptrain` beside it holds its
            checkpoints.
        form: "merged", a model folder like the one trained; "adapter", peft's files for it.
        resume: go on with an interrupted run, to the same result.
        force: replace what is at the output, and forget an interrupted run.
        device: a torch device; None for an accelerator if there is one.
        report_to: one of the Trainer's integrations, "tensorboard" or "wandb" for two.
        progress: called as progress(stage, done, total, info).

    Raises:
        InputError: what was asked cannot be done; nothing has been written.
        Interrupted: SIGINT or SIGTERM came; `resume` goes on.
    """
    began = time.monotonic()
    if form not in FORMS:
        raise InputError(f"form {form!r} is unknown. Use {' or '.join(FORMS)}.")
    output = Path(output).expanduser()
    place = training_device(device)
    source = open_source(config.model)
    recipe = config.resolved(
        source=_remembered_source(source) if config.teacher is None else None,
        dtype="bfloat16" if has_fast_bfloat16(place) else "float32",
    )
    if recipe.full and form == "adapter":
        raise InputError("--full trains no adapter. Give --merge, or leave --full out.")
    if recipe.pissa and sharded():
        raise InputError("--pissa needs whole weights on every process. Leave it out with FSDP.")
    check_place(output, form=form, force=force, source=source)
    work = work_of(output, recipe, resume=resume, force=force)
    if recipe.teacher != "none":
        check_same_tokens(str(recipe.teacher), config.model)
    data = prepare(load_tokenizer(config.model), recipe)
    digest = data.digest
    work.check_text(recipe, digest)

    arguments = trainer_arguments(recipe, work, output, place, report_to)
    if arguments.should_save:
        work.begin(recipe, digest)
    # The other processes may not look for the folder before it is there.
    wait_for_all(arguments)
    set_seed(recipe.seed)
    with memory_explained(arguments), without_denormals():
        run = _Run(recipe, source, work, arguments, data, progress or (lambda *_: None))
        run.train()
        changed = run.finish(form)
    done = run.report(output, form, began)
    if arguments.should_save:
        if form == "adapter":
            write_adapter(source, run.adapter, done, force=force)
        else:
            write_model(source, changed, done, force=force)
        work.end()
    wait_for_all(arguments)
    return done


def _silent(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
    pass


def _remembered_source(source: Source) -> str | None:
    """The model that a checkpoint says it was converted from."""
    name = (getattr(source.config, "conversion", None) or {}).get("source")
    if name is not None:
        try:
            locate(name)
        except InputError as error:
            raise InputError(
                f"{source.path} was converted from {name}, which is not to be had ({error}) Give "
                "--teacher MODEL, or --teacher none to train on the text alone."
            ) from error
    return name


class _Run:
    """The parts of one run, from loading to what is to be written."""

    def __init__(
        self,
        config: UptrainConfig,
        source: Source,
        work: Work,
        arguments: TrainingArguments,
        data: Prepared,
        progress: Progress,
    ) -> None:
        self.config, self.source, self.work = config, source, work
        self.arguments, self.data = arguments, data
        low = config.dtype == "bfloat16"
        model = load_model(source.path)
        faster = attention_implementation(arguments.device, bfloat16=low, window=config.window)
        if faster is not None:
            model.set_attn_implementation(faster)
        model = add_trained(model, config)
        if config.pissa and arguments.should_save and work.checkpoint is None:
            keep_start(model, work.start)
        settle(model, bfloat16=low)
        split = sharded()
        model = model if split else model.to(arguments.device)
        teacher = Teacher(None)
        if config.teacher != "none":
            teacher = load_teacher(
                str(config.teacher),
                model,
                device=torch.device("cpu") if split else arguments.device,
                bfloat16=low,
                share=not split,
            )
        self.teacher_bytes, self.shared_bytes = teacher.bytes, teacher.shared_bytes
        self.watch = Report(progress if arguments.should_save else _silent)
        self.stop = Stop()
        self.trainer = Distiller(
            config,
            teacher.model,
            model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            callbacks=[self.watch, self.stop],
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained_parameters = sum(p.numel() for p in trained)
        self.history: list[dict[str, Any]] = []
        self.adapter = work.folder / "adapter"

    def train(self) -> None:
        checkpoint = self.work.checkpoint
        with self.stop.listening():
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = self.trainer.state
        self.history = [row for row in state.log_history if "eval_perplexity" in row]
        if self.stop.number and state.global_step < self.config.steps:
            raise Interrupted(
                self.stop.number,
                f"stopped after step {state.global_step} of {self.config.steps}, which is saved; "
                "the same command with --resume goes on.",
            )

    def finish(self, form: str) -> dict[str, Tensor]:
        """The weights that training changed, by name; frees the rest. The adapter is on disk."""
        trainer, config = self.trainer, self.config
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded() else None
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not self.arguments.should_save:
            return {}
        if config.full:
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            weights = dict(model.named_parameters()) if state is None else state
            return {name: weights[name].detach().cpu() for name in trained}
        # Where its user finds it, not where it was on this machine.
        model.peft_config[ADAPTER].base_model_name_or_path = config.model
        start = self.work.start if config.pissa else None
        save_adapter(model, self.adapter, start=start, state=state)
        if form == "adapter":
            return {}
        # Merged on the weights as they are stored, which training may have rounded; what it needed
        # is let go before.
        del model, trainer, self.trainer
        gc.collect()
        return merged_weights(load_model(self.source.path), self.adapter)

    def report(self, output: Path, form: str, began: float) -> Uptraining:
        config = self.config
        taught = config.teacher != "none"
        per_step = config.batch * config.window
        curve = [
            HeldOut(
                tokens=row["step"] * per_step,
                perplexity=row["eval_perplexity"],
                kl=row["eval_kl"] if taught else None,
            )
            for row in self.history
        ]
        return Uptraining(
            output=output,
            form=form,
            steps=config.steps,
            tokens=config.steps * per_step,
            text_tokens=min(config.steps * config.batch, len(self.data.train)) * config.window,
            seconds=time.monotonic() - began,
            tokens_per_second=self.watch.steps * per_step / max(self.watch.seconds, 1e-9),
            trained_parameters=self.trained_parameters,
            before=curve[0],
            after=curve[-1],
            teacher_perplexity=self.history[-1]["eval_teacher_perplexity"] if taught else None,
            dropped_windows=self.data.dropped,
            teacher_bytes=self.teacher_bytes,
            shared_bytes=self.shared_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            curve=curve,
            recipe=config,
        )
