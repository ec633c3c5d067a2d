"""Training of a byte-level BPE tokenizer on the text of the data."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unimoe_model.prompt import ASSISTANT, PLACEHOLDERS, USER

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


_SPECIAL = (PAD, BOS, EOS, USER, ASSISTANT, *PLACEHOLDERS.values())
LEAST_VOCAB_SIZE = 256 + len(_SPECIAL)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer in which media placeholders and roles are single tokens.

    Args:
        texts: training texts; the result is a deterministic function of them.
        vocab_size: maximum number of entries, including special tokens and the 256 bytes.

    Raises:
        ValueError: If `vocab_size` is too small for bytes and special tokens.
    """
    if vocab_size < LEAST_VOCAB_SIZE:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least {LEAST_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )
