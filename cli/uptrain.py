"""`rehead uptrain`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .console import (
    QUIET,
    VERBOSE,
    choice,
    first_process,
    print_json,
    progress_bars,
    results,
    size,
)

TEXT = "Text"
TRAINED = "What is trained"
TRAINING = "How"
RUN = "Running"


def uptrain(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The model to train, as convert wrote it.")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE", help=".txt, .jsonl (field text), either .gz, or a hub data set."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The folder to write. [dim]Default: DIR-uptrained, here.[/]"),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--adapter",
            help="Write a whole model, or a peft adapter for DIR.",
        ),
    ] = True,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model whose scores to match; none: the text alone. "
            "[dim]Default: the one DIR was converted from.[/]",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to train on.", rich_help_panel=TEXT)
    ] = 1_000_000,
    eval_text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Held-out text. [dim]Default: what follows in the data.[/]",
            rich_help_panel=TEXT,
        ),
    ] = None,
    eval_windows: Annotated[
        int, typer.Option(min=1, help="Held-out windows.", rich_help_panel=TEXT)
    ] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens in one.", rich_help_panel=TEXT)] = 512,
    target: Annotated[
        str,
        typer.Option(
            help="attention, all-linear, or a regex for whole names.", rich_help_panel=TRAINED
        ),
    ] = "attention",
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Train the weights themselves, no adapter.", rich_help_panel=TRAINED
        ),
    ] = False,
    rank: Annotated[
        int, typer.Option(min=1, help="Of the adapter.", rich_help_panel=TRAINED)
    ] = 128,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Scales the adapter by alpha / rank. [dim]Default: the rank.[/]",
            rich_help_panel=TRAINED,
        ),
    ] = None,
    dora: Annotated[
        bool,
        typer.Option("--dora", help="Magnitudes apart (2402.09353).", rich_help_panel=TRAINED),
    ] = False,
    pissa: Annotated[
        bool,
        typer.Option(
            "--pissa", help="Start from principal parts (2404.02948).", rich_help_panel=TRAINED
        ),
    ] = False,
    rslora: Annotated[
        bool,
        typer.Option(
            "--rslora", help="Scale by alpha / sqrt(rank) (2312.03732).", rich_help_panel=TRAINED
        ),
    ] = False,
    ce_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of the cross-entropy beside the KL. [dim]Default: 0.25; 1 without a teacher.[/]",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    match_weight: Annotated[
        float,
        typer.Option(
            min=0, help="Of each attention's error beside the KL.", rich_help_panel=TRAINING
        ),
    ] = 0.0,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="At its peak. [dim]Default: 1e-3, with --full 1e-4.[/]", rich_help_panel=TRAINING
        ),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the steps in which it rises. [dim]Default: 20 steps; 0.05 to 0.2.[/]",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Windows a step.", rich_help_panel=TRAINING)
    ] = 2,
    micro_batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Windows at a time. Lower for less memory and the same result.",
            rich_help_panel=RUN,
        ),
    ] = 2,
    evaluations: Annotated[
        int,
        typer.Option(min=1, help="How often to measure, and save.", rich_help_panel=RUN),
    ] = 8,
    seed: Annotated[int, typer.Option(help="Same seed, same result.", rich_help_panel=RUN)] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16 or float32, of products. [dim]Default: the faster here.[/]",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. [dim]Default: a GPU if any.[/]", rich_help_panel=RUN),
    ] = None,
    report_to: Annotated[
        str,
        typer.Option(help="none, tensorboard, wandb, ...: where to log.", rich_help_panel=RUN),
    ] = "none",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=RUN),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what is at the output.", rich_help_panel=RUN),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET, rich_help_panel=RUN)] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help=VERBOSE, rich_help_panel=RUN)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=RUN),
    ] = False,
) -> None:
    """Train DIR's attention towards the model it was converted from.

    For example: [bold]rehead uptrain SmolLM2-135M-mla --data text.jsonl.gz --tokens 500000[/]

    On several GPUs: [bold]accelerate launch -m rehead.uptraining DIR --data ...[/]
    """
    with results(as_json, verbose) as console:
        from ..uptraining import Interrupted, UptrainConfig
        from ..uptraining import uptrain as run

        if dtype is not None:
            choice("--dtype", dtype, ("bfloat16", "float32"))
        config = UptrainConfig(
            model=model,
            data=data,
            teacher=teacher,
            tokens=tokens,
            eval_text=eval_text,
            window=window,
            batch=batch,
            micro_batch=micro_batch,
            eval_windows=eval_windows,
            evaluations=evaluations,
            target=target,
            full=full,
            rank=rank,
            alpha=alpha,
            dora=dora,
            pissa=pissa,
            rslora=rslora,
            ce_weight=ce_weight,
            match_weight=match_weight,
            learning_rate=learning_rate,
            warmup=warmup,
            seed=seed,
            dtype=dtype,
        )
        try:
            with progress_bars(quiet, verbose) as progress:
                done = run(
                    config,
                    output=output or _default_output(model),
                    form="merged" if merge else "adapter",
                    resume=resume,
                    force=force,
                    device=device,
                    report_to=report_to,
                    progress=progress,
                )
        except Interrupted as stop:
            if first_process():
                print(f"rehead: {stop}", file=sys.stderr)
            raise typer.Exit(128 + stop.number) from stop
        if not first_process():
            return
        if as_json:
            print_json(console, done.to_dict())
        else:
            _summarize(console, done)


def _default_output(model: str) -> Path:
    path = Path(model)
    return Path(f"{path.name or path.resolve().name}-uptrained")


def _summarize(console: Console, done: Any) -> None:
    teacher = done.teacher_perplexity
    beside = "" if teacher is None else f" (teacher {teacher:.4g})"
    console.print(
        f"Held-out perplexity: {done.before.perplexity:.4g} -> "
        f"[bold]{done.after.perplexity:.4g}[/]{beside}"
    )
    if teacher is not None:
        console.print(f"Held-out KL: {done.before.kl:.4g} -> [bold]{done.after.kl:.4g}[/]")
        console.print(
            f"Weights shared with the teacher: {size(done.shared_bytes)} of "
            f"{size(done.teacher_bytes)}"
        )
    if done.dropped_windows:
        console.print(f"Left out, as held-out text: {done.dropped_windows} windows")
    minutes, seconds = divmod(round(done.seconds), 60)
    console.print(
        f"Trained {done.trained_parameters:,} parameters on {done.tokens:,} tokens in {minutes} "
        f"min {seconds} s ({done.tokens_per_second:,.0f} tokens/s), "
        f"{size(done.peak_rss_bytes)} of memory at most"
    )
    console.print(f"Written to [bold]{done.output}[/]", soft_wrap=True)
