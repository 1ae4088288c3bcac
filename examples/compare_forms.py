"""Perplexity of a model in every form at one cache, in closed form.

python examples/compare_forms.py MODEL --kv-budget 50%
"""

import tempfile
from typing import Annotated

import typer

from rehead.converters import InputError, convert
from rehead.converters.text import evaluation_text, windows
from rehead.evaluation import load_model, load_tokenizer, perplexity

FORMS = {
    "mla": {},
    "mla on-read": {"rope": "on-read"},
    "mfa": {},
    "mfa-kr": {},
    "gqa": {},
}


def main(
    model: str,
    kv_budget: str = "50%",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 16,
    window: int = 512,
    count: int = 8,
) -> None:
    ids = windows(load_tokenizer(model), evaluation_text(), window, count)
    print(f"original     {perplexity(load_model(model), ids).perplexity:10.3f}")
    for name, options in FORMS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = convert(
                    model,
                    to=name.split()[0],
                    output=f"{folder}/converted",
                    kv_budget=kv_budget,
                    samples=samples,
                    heal=0,
                    **options,
                )
            except InputError as error:
                print(f"{name:12} {error}")
                continue
            value = perplexity(load_model(done.output), ids).perplexity
        print(f"{name:12} {value:10.3f}  at {done.kv_budget:.1%} of the cache")


if __name__ == "__main__":
    typer.run(main)
