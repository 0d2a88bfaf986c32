"""Train and save the byte-level BPE tokenizer of the reference model.

Run `python tests/reference_model/tokenizer.py --vocab 2048 --out FOLDER`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import tasks
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvtc_vllm.evaluation.data import corpus, generators, words

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL = [BOS, EOS, PAD, generators.USER, generators.ASSISTANT, generators.SYSTEM, generators.END]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _training_text() -> Iterator[str]:
    """Prose twice, half of the code, and as much of the tasks as the model will care for."""
    for _ in range(2):
        yield from corpus.prose_documents("train")
    yield from corpus.code_documents("train")[::2]
    for seed in range(3000):
        text = tasks.sample_task(generators.seeded("train", seed, "tokenizer"), "train", 0.3).text()
        for special in SPECIAL:
            text = text.replace(special, "\n")
        yield text
    # Single-token names make the look-ups of the tasks a matter of one attention step.
    named = [*words.NOUNS, *words.PLACES, *words.PEOPLE, *words.COLOURS, *words.CITIES[::2]]
    for _ in range(1200):
        yield "".join(f" {word}\n" for word in named)


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Fit the merges on training text; each digit stays a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A digit is a token, with the blank before it if there is one.
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _training_text(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    train_tokenizer(arguments.vocab).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
