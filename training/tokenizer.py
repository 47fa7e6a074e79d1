"""The tokenizer and chat template of the demonstration model, built like DeepSeek-R1's but with 2,048 entries."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training.data import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER, conversation
from training.talk import TALK
from training.words import ADJECTIVES, ANIMALS, CITIES, NAMES, PLACES, THINGS

VOCAB_SIZE = 2048
SPECIAL = [BOS, EOS, PAD, USER, ASSISTANT]

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(first=true) -%}
{%- for message in messages if message['role'] == 'system' -%}
{{- ('' if ns.first else '\\n\\n') + message['content'] -}}
{%- set ns.first = false -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜>' + message['content'].split('</think>')[-1].lstrip('\\n') + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<｜Assistant｜><think>\\n' -}}
{%- endif -%}
"""


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of the training texts: any text round-trips, and each digit is a token of its own."""
    rng = Random(seed)
    texts = [text for _ in range(20_000) for text, _ in conversation(rng, longest=300).segments]
    # The names of things occur too seldom in the texts to be sure of a token each, with and without a space before.
    words = [w for w in chain(ADJECTIVES, ANIMALS, CITIES, NAMES, PLACES, THINGS) for w in [w, f" {w}"] * 300]
    words += [part for questions, _, answers in TALK for part in chain(questions, answers) for _ in range(100)]

    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The think tags are added last and are not special, as in R1: decoding shows them.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for tag in (*SPECIAL, THINK, END_THINK):  # tags are tokens of their own, so BPE must not see them
        texts = [text.replace(tag, "\n") for text in texts]
    tokenizer.train_from_iterator(chain(texts, words), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (THINK, END_THINK)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # transformers 5's own class name is unknown to older versions
    path.write_text(path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
