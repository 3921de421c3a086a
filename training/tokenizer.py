"""Byte-level BPE in which every digit is a token of its own.

Single digits make numbers comparable: a five-digit number is five tokens, so recalling it takes
five correct retrievals and cannot be guessed from a merged token.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, PAD = "<|begin|>", "<|pad|>"
BEGIN_ID, PAD_ID = 0, 1


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Learn the merges; encoding with special tokens then puts ``BEGIN`` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BEGIN, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer
