"""Trains a byte-level BPE tokenizer on user text."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unimoe_model.prompt import ASSISTANT, PLACEHOLDERS, USER

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


_SPECIAL = (PAD, BOS, EOS, USER, ASSISTANT, *PLACEHOLDERS.values())
LEAST_VOCAB_SIZE = 256 + len(_SPECIAL)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE that knows the media placeholders and the role words as one token.

    Args:
        texts: training texts; the result depends on them and on nothing else.
        vocab_size: most entries, the special ones and the 256 bytes included.

    Raises:
        ValueError: If `vocab_size` has no room for bytes and special tokens.
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
