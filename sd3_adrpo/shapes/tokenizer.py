"""One byte-level BPE of 1,024 entries for the pipeline's text encoders and the reward's CLIP, in CLIP's own format."""

from __future__ import annotations

import json
import random

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ..prompts import PROMPTS_DIR, read_prompts
from .grammar import random_scene

VOCABULARY = 1024
LENGTH = 24  # tokens; the longest sentence of the world takes 15, other prompts are cut with a warning


def train() -> CLIPTokenizer:
    """Learns merges on the world's sentences and on general English prompts; takes any text, as its base is bytes."""
    rng = random.Random(0)
    sentences = [random_scene(rng).prompt for _ in range(4000)]
    general = [prompt.text.lower() for prompt in read_prompts(PROMPTS_DIR / "drawbench_style.csv")]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(sentences + general, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    base = alphabet + [byte + "</w>" for byte in alphabet]
    merges = merges[: VOCABULARY - len(base) - 2]
    entries = base + ["".join(pair) for pair in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]  # last: open_clip finds the end of a text by the largest id
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
