"""The language encoder's tokenizer, or one that needs no file."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .files import require_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def load_tokenizer(source: str | dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub repository; a random model, given as a dict, gets the byte-level one.

    Raises:
        FileNotFoundError: if the source isn't there, or has no tokenizer; says how to get it.
        ValueError: if its files are damaged.
    """
    if isinstance(source, dict):
        return byte_tokenizer()
    require_file(source, TOKENIZER_FILES, "tokenizer; name one that fits by model.tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises nothing more exact for a file that it can't read
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source}: its tokenizer can't be read ({reason}). Fetch its files again.") from error


def byte_tokenizer(texts: Iterable[str] = (), vocab_size: int = 0) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows any text: a token for each byte, and for the words of `texts` while there is room.

    A small model that begins with random weights has little to spell words with: given them whole, it learns sooner which
    instruction is which.

    Args:
        texts: what will be read often, such as a dataset's instructions.
        vocab_size: tokens at the most; bytes and special tokens take 259.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
