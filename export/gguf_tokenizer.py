"""A folder's tokenizer as the metadata that llama.cpp reads."""

import json
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer

from ..converters.errors import InputError

# How a tokenizer.json splits text before byte pairs are merged -> llama.cpp's name for it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Adds the folder's tokenizer, its special tokens and its chat template.

    Raises:
        InputError: llama.cpp would tokenize otherwise, or it is not known whether.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if (folder / "tokenizer.model").is_file():
        _add_sentencepiece(writer, folder, vocab_size)
    else:
        _add_byte_pairs(writer, tokenizer, folder, vocab_size)
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(first == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_byte_pairs(writer: gguf.GGUFWriter, tokenizer: Any, folder: Path, size: int) -> None:
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model, split = core["model"], split_name(core["pre_tokenizer"])
    if model["type"] != "BPE" or model.get("byte_fallback") or core.get("normalizer") or not split:
        raise InputError(
            f"the tokenizer of {folder} is of a kind that this export does not write to GGUF "
            f"({model['type']}, {(core['pre_tokenizer'] or {}).get('type')})."
        )
    tokens = {index: (token, gguf.TokenType.NORMAL) for token, index in model["vocab"].items()}
    for added in core["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = added["content"], kind
    # A model may have more embeddings than its tokenizer has tokens.
    rows = [tokens.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges(merges)


def split_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for a tokenizer.json's pre-tokenizer; None for one without."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    whole = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and whole:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and whole:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not whole and not steps[0].get("invert"):
        return SPLITS.get(steps[0]["pattern"].get("Regex"))
    return None


def _add_sentencepiece(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    rows = list(gguf.SentencePieceVocab(folder).all_tokens())
    rows += [
        (f"[PAD{i}]".encode(), -10000.0, gguf.TokenType.UNUSED) for i in range(len(rows), size)
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _, _ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for _, _, kind in rows])
