"""Text of any size: tokenizers, files read in constant memory, and corpora tokenised once."""

from .corpus import Corpus, Plan, prepare
from .permutation import permuted
from .reading import TextSource, documents, listing
from .tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer, save_tokenizer, train_bpe

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "Plan",
    "TextSource",
    "Tokenizer",
    "documents",
    "listing",
    "load_tokenizer",
    "permuted",
    "prepare",
    "save_tokenizer",
    "train_bpe",
]
