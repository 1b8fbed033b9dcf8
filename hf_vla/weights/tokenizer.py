"""The language encoder's tokenizer, or one that needs no file."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .files import require_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def load_tokenizer(source: str | dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub repository; a random model, given as a dict, gets the byte-level one.

    Raises:
        FileNotFoundError: if the source isn't there, or has no tokenizer; says how to get it.
    """
    if isinstance(source, dict):
        return byte_tokenizer()
    require_file(source, TOKENIZER_FILES, "tokenizer; name one that fits by model.tokenizer")
    return AutoTokenizer.from_pretrained(source)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows any text: one token a byte, 259 with the special ones, `<s>` in front."""
    tokens = [*SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
