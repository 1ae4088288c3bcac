"""What an uptraining run is asked to do, and what it did."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..converters.errors import InputError

# Chosen from the curves in docs/uptraining.md; so are two windows a step: many small ones.
LORA_LEARNING_RATE = 1e-3
FULL_LEARNING_RATE = 1e-4
# Steps. Full ones in the direction that the first few windows give cost more than they bring.
WARM_UP = 20
# Beside the KL: the text teaches what its teacher is unsure of.
CE_WEIGHT = 0.25

# What may differ between an interrupted run and the one that resumes it: these change how the same
# numbers are computed, not which.
MACHINE = ("micro_batch",)


@dataclass(frozen=True)
class UptrainConfig:
    """The recipe; it is saved beside the result, with everything left open filled in.

    Args:
        model: the model to train, a folder, converted or not.
        data: the text to train on, see `converters.text.read_text`.
        teacher: the model whose logits are matched; "none" for plain text, None for the source
            that a converted checkpoint remembers.
        tokens: how many tokens to train on; a shorter text is read again.
        eval_text: the held-out text; None keeps the windows after those trained on.
        window: tokens in a window.
        batch: windows a step, over all processes.
        micro_batch: windows at a time in one process; gradients are accumulated up to `batch`.
        eval_windows: how many held-out windows.
        evaluations: how often they are measured; a checkpoint is written as often.
        target: "attention", "all-linear", or a regex that a module's whole name must match.
        full: train the target's weights themselves, without an adapter.
        rank: of the adapter.
        alpha: the adapter's product is scaled by alpha / rank; None for the rank.
        dora, pissa, rslora: peft's variants (2402.09353, 2404.02948, 2312.03732).
        ce_weight: weight of the cross-entropy beside the KL; None for 0.25, or 1 without a teacher.
        match_weight: weight of the relative squared error of each attention block's output.
        learning_rate: the peak; None for the default of adapter or full training.
        warmup: share of the steps in which the rate rises; it falls along a cosine afterwards.
            None for 20 steps, but at least 0.05 and at most 0.2 of all.
        dtype: "bfloat16" computes products in it, "float32" everything in float32; None for
            bfloat16 where the machine is faster with it. Trained weights are float32 in any case.
    """

    model: str
    data: str
    teacher: str | None = None
    tokens: int = 1_000_000
    eval_text: str | None = None
    window: int = 512
    batch: int = 2
    micro_batch: int = 2
    eval_windows: int = 16
    evaluations: int = 8
    target: str = "attention"
    full: bool = False
    rank: int = 128
    alpha: float | None = None
    dora: bool = False
    pissa: bool = False
    rslora: bool = False
    ce_weight: float | None = None
    match_weight: float = 0.0
    learning_rate: float | None = None
    warmup: float | None = None
    seed: int = 0
    dtype: str | None = None

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.batch * self.window))

    @property
    def warmup_steps(self) -> int:
        share = min(0.2, max(0.05, WARM_UP / self.steps)) if self.warmup is None else self.warmup
        return round(share * self.steps)

    @property
    def every(self) -> int:
        """Steps from one evaluation, and checkpoint, to the next."""
        return max(1, -(-self.steps // self.evaluations))

    def resolved(self, *, source: str | None, dtype: str) -> "UptrainConfig":
        """The same recipe with nothing left open.

        Args:
            source: the teacher where none is named; None if the checkpoint remembers none.
            dtype: the one to compute in where none is named.

        Raises:
            InputError: options contradict each other.
        """
        teacher = self.teacher or source
        if teacher is None:
            raise InputError(
                f"{self.model} does not say which model it was converted from. Give --teacher "
                "MODEL, or --teacher none to train on the text alone."
            )
        alone = teacher == "none"
        rate = FULL_LEARNING_RATE if self.full else LORA_LEARNING_RATE
        config = replace(
            self,
            teacher=teacher,
            alpha=float(self.rank) if self.alpha is None else self.alpha,
            ce_weight=(1.0 if alone else CE_WEIGHT) if self.ce_weight is None else self.ce_weight,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            dtype=self.dtype or dtype,
        )
        config._check(alone)
        return config

    def _check(self, alone: bool) -> None:
        variants = [f"--{name}" for name in ("dora", "pissa", "rslora") if getattr(self, name)]
        if self.full and variants:
            raise InputError(f"--full trains no adapter, so {variants[0]} means nothing with it.")
        if self.dora and self.pissa:
            raise InputError("--dora and --pissa both decide the adapter's start. Give one.")
        if alone and self.match_weight:
            raise InputError("--match-weight compares with a teacher, and --teacher is none.")
        if alone and not self.ce_weight:
            raise InputError("--ce-weight 0 with --teacher none leaves nothing to train on.")
        if self.dtype not in ("bfloat16", "float32"):
            raise InputError(f"--dtype {self.dtype}: training computes in bfloat16 or float32.")
        low = {"window": 2, "batch": 1, "micro_batch": 1, "rank": 1, "tokens": 1}
        for name, least in (low | {"eval_windows": 1, "evaluations": 1}).items():
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)} must be at least {least}.")

    def same_run(self, other: dict[str, Any]) -> list[str]:
        """The names of the options in which a recorded recipe differs from this one."""
        mine = {key: value for key, value in asdict(self).items() if key not in MACHINE}
        return [key for key, value in mine.items() if other.get(key) != value]


@dataclass(frozen=True)
class HeldOut:
    """The held-out windows seen by the model after so many tokens.

    Args:
        perplexity: of the model being trained.
        kl: mean over tokens of KL(teacher || model) in nats; None without a teacher.
    """

    tokens: int
    perplexity: float
    kl: float | None


@dataclass(frozen=True)
class Uptraining:
    """What a run did.

    Args:
        form: "merged" or "adapter".
        tokens: trained on, and `text_tokens` of them different ones.
        tokens_per_second: while training, without evaluations and checkpoints.
        teacher_perplexity: on the held-out windows.
        dropped_windows: of the text, left out because they repeat held-out text.
        shared_bytes: of the teacher's weights that are the model's own, held once.
    """

    output: Path
    form: str
    steps: int
    tokens: int
    text_tokens: int
    seconds: float
    tokens_per_second: float
    trained_parameters: int
    before: HeldOut
    after: HeldOut
    teacher_perplexity: float | None
    dropped_windows: int
    shared_bytes: int
    teacher_bytes: int
    peak_rss_bytes: int
    curve: list[HeldOut] = field(default_factory=list)
    recipe: UptrainConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints and that is saved as uptraining.json."""
        return asdict(self) | {"output": str(self.output)}
