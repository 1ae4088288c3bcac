"""transformers' Trainer with our loss, our held-out measure, progress and a stop on a signal.

Letters: B windows, L tokens in a window, V entries in the vocabulary.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..converters.errors import InputError
from .config import UptrainConfig
from .loss import NO_TARGET, Head, chunked_loss
from .states import States, attention_modules, causal_lm, forward_states, has_plain_head, head_of

Progress = Callable[[str, int, int, dict[str, Any]], None]


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after a step, which is saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Distiller(Trainer):
    """A Trainer whose loss compares the model with a teacher.

    Args:
        config: resolved.
        teacher: a frozen model, or None.
    """

    # The mean over a micro-batch, which all are of one size.
    loss_is_scaled_for_ga = False

    def __init__(self, config: UptrainConfig, teacher: Any | None, model: Any, **options: Any):
        super().__init__(model=model, compute_metrics=held_out_metrics, **options)
        # Without the printed logs: progress is ours.
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self.recipe, self.teacher = config, teacher
        self.dtype = getattr(torch, str(config.dtype))
        low = self.dtype == torch.bfloat16
        self.plain = [has_plain_head(m, bfloat16=low) for m in (model, teacher) if m is not None]
        if teacher is not None and self.is_fsdp_enabled:
            self.teacher = fsdp2_prepare_model(self.accelerator, teacher)
        sizes = [causal_lm(m).config.vocab_size for m in (model, teacher) if m is not None]
        # Two models of one tokenizer may have padded their tables differently.
        self.vocabulary = min(sizes)
        if teacher is not None and config.match_weight:
            ours, theirs = (len(attention_modules(m)) for m in (model, teacher))
            if ours != theirs:
                raise InputError(
                    f"--match-weight needs a teacher with {ours} attention blocks, and "
                    f"{config.teacher} has {theirs}."
                )

    def _autocast(self) -> Any:
        low = self.dtype == torch.bfloat16
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=low)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, by_token = self._loss(model, inputs["input_ids"])
        return (loss, by_token) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, [B, 3], [B, 1]): each window's mean KL, cross-entropy and teacher's, no labels."""
        ids = self._prepare_inputs(inputs)["input_ids"]
        loss, by_token = self._loss(model, ids)
        total = by_token.view(*ids.shape, 3).double().sum(1)
        length = ids.shape[1]
        return loss, total / total.new_tensor([length, length - 1, length - 1]), ids[:, :1]

    def _loss(self, wrapped: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The loss on windows [B, L], and [B L, 3] of `chunked_loss`."""
        config, match = self.recipe, bool(self.recipe.match_weight)
        inner = self.accelerator.unwrap_model(self.model)
        seen = forward_states(inner, wrapped, ids, plain=self.plain[0], attention=match)
        other = None if self.teacher is None else self._teacher_states(ids, match)
        targets = torch.full_like(ids, NO_TARGET)
        targets[:, :-1] = ids[:, 1:]
        loss, by_token = chunked_loss(
            seen.last.flatten(0, 1),
            self._head(inner, self.plain[0]),
            targets.flatten(),
            teacher_states=None if other is None else other.last.flatten(0, 1),
            teacher_head=None if other is None else self._head(self.teacher, self.plain[1]),
            vocabulary=self.vocabulary,
            kl_weight=float(other is not None),
            ce_weight=float(config.ce_weight or 0),
        )
        if other is not None and match:
            loss = loss + config.match_weight * attention_error(seen, other)
        return loss, by_token

    def _teacher_states(self, ids: Tensor, match: bool) -> States:
        with torch.no_grad(), self._autocast():
            return forward_states(
                self.teacher, self.teacher, ids, plain=self.plain[1], attention=match
            )

    def _head(self, model: Any, plain: bool) -> Head:
        return head_of(model, plain=plain, dtype=self.dtype)


def attention_error(student: States, teacher: States) -> Tensor:
    """Mean over blocks of |student - teacher|^2 / |teacher|^2, in float32."""
    errors = [
        (mine.float() - theirs.float()).square().sum() / theirs.float().square().sum()
        for mine, theirs in zip(student.attention, teacher.attention, strict=True)
    ]
    return torch.stack(errors).mean()


def held_out_metrics(seen: EvalPrediction) -> dict[str, float]:
    """Perplexities and KL over all held-out windows, which are of one length."""
    kl, ce, teacher_ce = np.asarray(seen.predictions, dtype=np.float64).mean(axis=0).tolist()
    return {
        "kl": kl,
        "perplexity": _exp(ce),
        "teacher_perplexity": _exp(teacher_ce),
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf if value == value else math.nan


class Report(TrainerCallback):
    """Passes progress on, and refuses to go on with a loss that is no number."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.info: dict[str, Any] = {}
        self.seconds, self.steps, self._began = 0.0, 0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps += 1
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise InputError(
                    f"the loss is {logs['loss']} at step {state.global_step}. Give a lower "
                    "--learning-rate."
                )
            self.info["loss"] = float(logs["loss"])
        if "eval_perplexity" in logs:
            self.info["held-out ppl"] = float(logs["eval_perplexity"])
        self._show(state)

    def _show(self, state: Any) -> None:
        self.progress("uptrain", state.global_step, state.max_steps, dict(self.info))


class Stop(TrainerCallback):
    """Saves and stops after the step in which SIGINT or SIGTERM came; a second one is obeyed."""

    def __init__(self) -> None:
        self.number = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree(args)
        if self.number and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def _agree(self, args: Any) -> None:
        """Processes see a signal at different times; all have to stop after the same step."""
        if args.world_size > 1:
            number = torch.tensor(self.number, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        old: dict[int, Any] = {}

        def hear(number: int, frame: Any) -> None:
            self.number = number
            for each, handler in old.items():
                signal.signal(each, handler)

        try:
            for number in (int(signal.SIGINT), int(signal.SIGTERM)):
                old[number] = signal.signal(number, hear)
        except ValueError:
            pass  # not in the main thread, where signals never come
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
