"""`convert` and `rehead convert`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .console import (
    QUIET,
    VERBOSE,
    ProgressCall,
    choice,
    completing,
    first_process,
    print_json,
    progress_bars,
    results,
    size,
)

if TYPE_CHECKING:
    from torch import Tensor

SIZE = "Size of the cache"
TEXT = "Calibration and healing"
RUN = "Running"
REPORT = "Report"
# What a shell offers for --to, which must not wait for torch.
FORM_NAMES = ("gqa", "mqa", "mla", "mfa", "mfa-kr")


def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, a folder, or a .gguf file.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="The form of attention: gqa, mqa, mla, mfa or mfa-kr.",
            autocompletion=completing(*FORM_NAMES),
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="The folder to write. [dim]Default: MODEL-FORM, here.[/]")
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="The share of the KV cache to keep per token, 50% or 0.5. [dim]Default: 50%.[/]",
            rich_help_panel=SIZE,
        ),
    ] = None,
    kv_lora_rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="MLA: width of the latent. Overrides the budget.", rich_help_panel=SIZE
        ),
    ] = None,
    qk_rope_head_dim: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="MLA, MFA: rotated dims of the key. Overrides the budget. "
            "[dim]On-read they cost none of it, and are at most a layer's latent; "
            "0 rotates every key whole.[/]",
            rich_help_panel=SIZE,
        ),
    ] = None,
    q_lora_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="MLA: give the queries a low rank too. [dim]Default: full.[/]",
            rich_help_panel=SIZE,
        ),
    ] = None,
    num_key_value_heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="GQA: KV heads to keep. Overrides the budget.", rich_help_panel=SIZE
        ),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            min=2, help="MFA: width of the one head. Overrides the budget.", rich_help_panel=SIZE
        ),
    ] = None,
    share_q_dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="MFA: width the queries share. [dim]Default: what the error allows.[/]",
            rich_help_panel=SIZE,
        ),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="GQA, MQA: aligned heads merged, or their mean. [dim]Default: aligned.[/]",
            rich_help_panel=SIZE,
        ),
    ] = None,
    rope: Annotated[
        str,
        typer.Option(
            help="MLA: decoupled, with a small rotated key; or on-read, keys rotated when read.",
            autocompletion=completing("decoupled", "on-read"),
            rich_help_panel=SIZE,
        ),
    ] = "decoupled",
    kv_bits: Annotated[
        str | None,
        typer.Option(
            help="MLA: bits of a cached number: auto, by what each matters; 8 or 4 for all that "
            "are kept; or 16.",
            autocompletion=completing("auto", "16", "8", "4"),
            rich_help_panel=SIZE,
        ),
    ] = None,
    exact_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First tokens of a sequence that keep 16 bits in a coded cache. "
            "[dim]Default: 4.[/]",
            rich_help_panel=SIZE,
        ),
    ] = None,
    uniform_rank: Annotated[
        bool,
        typer.Option(
            "--uniform-rank",
            help="Give every layer the same dims. [dim]Default: by measured need.[/]",
            rich_help_panel=SIZE,
        ),
    ] = False,
    native: Annotated[
        bool,
        typer.Option(
            "--native",
            help="The same dims and frequencies in every layer, as transformers' own MLA classes "
            "need.",
            rich_help_panel=SIZE,
        ),
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            help="MLA: engine, what llama.cpp can hold: --native, no biases, plain frequencies.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help=".txt, .jsonl (field text), either .gz, or a hub data set; given several times, "
            "an equal share of each. [dim]Default: default, articles, stories, problems and code "
            "that come with rehead.[/]",
            rich_help_panel=TEXT,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Calibration sequences to use.", rich_help_panel=TEXT),
    ] = None,
    heal: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            min=0,
            help="Healing steps a layer; 0 is the closed form alone. [dim]Default: a good few.[/]",
            rich_help_panel=TEXT,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.", rich_help_panel=RUN)] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights written. [dim]Default: MODEL's.[/]", rich_help_panel=RUN),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.", rich_help_panel=RUN)] = "cpu",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=RUN),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=RUN),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the model at the output.", rich_help_panel=RUN),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page about the conversion, such as report.html.",
            rich_help_panel=REPORT,
        ),
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With --report: a text to measure both models on, as for rehead evaluate.",
            rich_help_panel=REPORT,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET, rich_help_panel=RUN)] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help=VERBOSE, rich_help_panel=RUN)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=RUN),
    ] = False,
) -> None:
    """Convert MODEL to another form of attention, with a smaller KV cache.

    For example: [bold]convert --to mla HuggingFaceTB/SmolLM2-135M --kv-budget 50%[/]

    On several GPUs: [bold]accelerate launch -m rehead.converters --to mla MODEL --device cuda[/]
    """
    with results(as_json, verbose) as console:
        from ..converters import FORMS, POOLINGS, PRESETS, ROPES
        from ..converters import convert as run

        choice("--to", to, list(FORMS))
        choice("--rope", rope, list(ROPES))
        if pooling is not None:
            choice("--pooling", pooling, list(POOLINGS))
        if preset is not None:
            choice("--preset", preset, list(PRESETS))
        ids = _check_report(model, report, eval_text, force, dry_run) if first_process() else None
        with progress_bars(quiet, verbose) as progress:
            done = run(
                model,
                to=to,
                output=output or default_output(model, to),
                kv_budget=kv_budget,
                calibration=calibration,
                samples=samples,
                heal=heal,
                rope=rope,
                uniform_rank=uniform_rank,
                native=native,
                preset=preset,
                seed=seed,
                dtype=dtype,
                device=device,
                dry_run=dry_run,
                resume=resume,
                force=force,
                kv_lora_rank=kv_lora_rank,
                qk_rope_head_dim=qk_rope_head_dim,
                q_lora_rank=q_lora_rank,
                num_key_value_heads=num_key_value_heads,
                pooling=pooling,
                head_dim=head_dim,
                share_q_dim=share_q_dim,
                kv_bits=kv_bits,
                exact_tokens=exact_tokens,
                progress=progress,
            )
            if not first_process():
                return
            if report is not None:
                _report(report, done, eval_text, ids, device, progress)
        for line in done.warnings:
            print(f"rehead: warning: {line}", file=sys.stderr)
        if as_json:
            print_json(console, done.to_dict())
        else:
            _summarize(console, done, parts=verbose)


def default_output(model: str, form: str) -> Path:
    """`llama-7b-mla`, in the current folder, for any path or hub id that ends in `llama-7b`."""
    path = Path(model)
    name = path.name or path.resolve().name
    return Path(f"{name.removesuffix('.gguf')}-{form}")


def _check_report(
    model: str, report: Path | None, eval_text: str | None, force: bool, dry_run: bool
) -> "Tensor | None":
    """The evaluation text's windows, once it is sure that the report can be written."""
    if report is None:
        if eval_text is not None:
            raise typer.BadParameter(
                "--eval-text is measured for a report. Give --report FILE too."
            )
        return None
    if dry_run and eval_text is not None:
        raise typer.BadParameter("--dry-run writes no model that --eval-text could measure.")
    from ..converters.text import read_text
    from ..evaluation import check_report, comparison_windows

    check_report(report, force=force)
    return None if eval_text is None else comparison_windows(model, read_text(eval_text))


def _report(
    report: Path,
    done: Any,
    eval_text: str | None,
    ids: "Tensor | None",
    device: str,
    progress: ProgressCall,
) -> None:
    from ..evaluation import compare, write_report

    comparison = None
    if ids is not None:
        source, name = done.recipe.source, Path(eval_text or "").name
        comparison = compare(source, done.output, ids, name=name, device=device, progress=progress)
    write_report(report, done, comparison)


def _pays(tokens: int | None) -> str:
    if tokens == 0:
        return "Weights and cache together: no larger than the original's at any context"
    if tokens is None:
        return "[bold]Weights and cache together: larger than the original's at any context[/]"
    return (
        f"Weights and cache together: larger than the original's until {tokens:,} tokens are "
        "cached, in all sequences together"
    )


def _summarize(console: Console, done: Any, *, parts: bool) -> None:
    from ..converters.recipe import channel_words

    before, after = (done.kv_bytes_per_token[key] for key in ("source", "converted"))
    console.print(
        f"KV cache per token: {size(before)} -> [bold]{size(after)}[/] ({after / before:.1%})"
    )
    if done.coded:
        console.print(f"Cached numbers: {done.coded}")
    if done.attention_parameters:
        before, after = (done.attention_parameters[key] for key in ("source", "converted"))
        console.print(f"Attention's parameters: {before:,} -> {after:,} ({after / before:.1%})")
        console.print(_pays(done.pays_from_tokens))
    errors = [layer.error for layer in done.layers if layer.error is not None]
    if errors:
        mean, worst = sum(errors) / len(errors), max(range(len(errors)), key=errors.__getitem__)
        console.print(f"Layer error: mean {mean:.4f}, most {errors[worst]:.4f} (layer {worst})")
    if done.output is None:
        for layer in done.layers:
            dims = ", ".join(f"{name} {value}" for name, value in layer.dims.items())
            codes = (f"; {name} in {channel_words(counts)}" for name, counts in layer.codes.items())
            console.print(f"layer {layer.layer}: {dims}{''.join(codes)}")
        console.print("A dry run: nothing was written.")
        return
    minutes, seconds = divmod(round(done.seconds), 60)
    console.print(f"Took {minutes} min {seconds} s, {size(done.peak_rss_bytes)} of memory at most")
    if parts:
        each = (f"{name} {seconds:.0f} s" for name, seconds in done.parts.items())
        console.print(f"Of that: {', '.join(each)}", soft_wrap=True)
    console.print(f"Written to [bold]{done.output}[/]", soft_wrap=True)
