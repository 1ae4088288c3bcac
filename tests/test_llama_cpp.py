"""An exported file in llama.cpp itself: the wheel of xllamacpp, which `make test` installs."""

import json
import subprocess
import sys

import folders
import pytest
import tiny
import torch
from emulate import emulated
from transformers import AutoTokenizer

from rehead.export import export

# Its server ends with the process, so it has one of its own.
SERVED = """
import json, os, sys
import xllamacpp
path, prompts = sys.argv[1], json.loads(sys.argv[2])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = path, 256, 1
params.warmup = params.fit_params = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# Its flash attention rounds to float16 on the way.
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
asked = {"max_tokens": 1, "temperature": 0.0, "logprobs": 10, "cache_prompt": False}
found = []
for prompt in prompts:
    done = server.handle_completions(asked | {"prompt": prompt, "ignore_eos": True})
    # Nothing where the token is part of a character: the server waits for the rest.
    steps = (done["choices"][0].get("logprobs") or {}).get("content") or []
    top = {t["id"]: t["logprob"] for step in steps for t in step["top_logprobs"]}
    found.append({"prompt_tokens": done["usage"]["prompt_tokens"], "top": top})
print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


def served(path, prompts) -> list[dict]:
    command = [sys.executable, "-c", SERVED, str(path), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def distance(model, prompt: list[int], top: dict[str, float]) -> float:
    """The largest difference of the log-probabilities that llama.cpp gave for the next token."""
    scores = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    return max(abs(float(scores[int(token)]) - given) for token, given in top.items())


@pytest.mark.parametrize("fields", [{}, dict(tie_word_embeddings=True, num_key_value_heads=4)])
def test_llama_cpp_computes_what_is_emulated(fields, tmp_path):
    fields = folders.MODEL_FIELDS | dict(rope_pairs=[[0, 1, 2]] * 2) | fields
    folders.save(tmp_path / "in", tiny.mla(**fields))
    draw = torch.randint(33, 127, (128 * 20,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "text.txt").write_text("".join(map(chr, draw)))
    options = dict(to="gguf", calibration=str(tmp_path / "text.txt"), samples=4)
    for rows in (4, 8):
        export(tmp_path / "in", output=tmp_path / f"{rows}.gguf", norm_rows=rows, **options)
    prompts = [draw[start : start + 40].tolist() for start in range(0, 1000, 100)]
    found = served(tmp_path / "4.gguf", prompts)
    told = [(prompt, r["top"]) for prompt, r in zip(prompts, found, strict=True) if r["top"]]
    assert len(told) >= 3
    same, other = (emulated(tmp_path / f"{rows}.gguf") for rows in (4, 8))
    assert max(distance(same, *each) for each in told) < 1e-4
    assert min(distance(other, *each) for each in told) > 0.1
    text = "The tree  sees 1,234\n\nrivers."
    (asked,) = served(tmp_path / "4.gguf", [text])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "in")
    assert asked["prompt_tokens"] == len(tokenizer(text)["input_ids"])
