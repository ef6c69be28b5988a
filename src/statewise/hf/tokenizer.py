"""Our tokenizers as tokenizer.json of the package tokenizers, which transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core import UsageError, write_json
from ..core.files import replace_file
from ..text import BpeTokenizer, ByteTokenizer, Tokenizer
from ..text.tokenizer import alphabet

END = "<end>"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: the same ids for every text, by AutoTokenizer.

    Where the tokenizer has an end, a text begins with it, as documents in training did, and it ends and pads texts.
    Raises UsageError where the package tokenizers is missing, or cannot do what a tokenizer does.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    if tokenizer.end is not None:
        config |= {"bos_token": END, "eos_token": END, "pad_token": END}
    replace_file(folder / "tokenizer.json", [json.dumps(engine(tokenizer)).encode()])
    write_json(folder / "tokenizer_config.json", config)


def engine(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json holds."""
    if isinstance(tokenizer, BpeTokenizer):
        vocabulary, merges, words = dict(tokenizer.vocabulary), tokenizer.merges, True
    elif isinstance(tokenizer, ByteTokenizer):
        vocabulary = {letter: byte for byte, letter in alphabet().items() if byte != tokenizer.end}
        merges, words = [], False
    else:
        raise UsageError(f"save_tokenizer: {type(tokenizer).__name__}; expected a BpeTokenizer or a ByteTokenizer")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
    end, added, after = tokenizer.end, [], None
    if end is not None:
        vocabulary[END] = end
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": end, "content": END, **flags, "special": True}]
        first = [{"SpecialToken": {"id": END, "type_id": 0}}]
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        after = {
            "type": "TemplateProcessing",
            "single": first + text,
            "pair": first + text + [{"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END: {"id": END, "ids": [end], "tokens": [END]}},
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": after,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }
