"""How much a model of some size learns from a text: the law behind train.py --minutes, bench.py --plan and
ablate.py --scaling. docs/minutes.md explains it; its constants, in scaling.json, are fitted to runs.
"""

import bz2
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

# floor: what no model goes below, held; size, data: parts of the rest, for a million parameters or bytes;
# size_power, data_power: how fast they fall; power: of their sum; passes: how many further passes a text is
# worth at most; error: of the losses of other texts
LAW: dict[str, float] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))["law"]

# difficulty_of English web text, assumed: losses of published runs imply 2.3 (FineWeb-EDU) to 3.0 (FineWeb)
WEB_DIFFICULTY = 2.6
CHARACTERS = 5e6  # of a text for which a byte-pair encoding is better


class Size(NamedTuple):
    """The shape of a network."""

    n_layer: int
    n_head: int
    n_embd: int

    def parameters(self, vocab_size: int) -> int:
        """Those that multiply each token: of the blocks and of lm_head."""
        return 12 * self.n_layer * self.n_embd**2 + vocab_size * self.n_embd

    def flops_per_token(self, vocab_size: int, block_size: int) -> int:
        """Of a training step, those of attention included."""
        return 6 * self.parameters(vocab_size) + 12 * self.n_layer * self.n_embd * block_size

    def __str__(self) -> str:
        return f"{self.n_layer}/{self.n_head}/{self.n_embd}"


class Text(NamedTuple):
    """What the law needs to know of a dataset."""

    tokens: float  # of train; inf if it does not end
    val_tokens: int
    vocab_size: int
    bytes_per_token: float
    difficulty: float | None  # see difficulty_of; None if the text is not known


def heads_of(n_embd: int) -> int:
    """The number of heads of a width: of 32 channels, in larger networks of 64 or 128, or as near as its
    divisors allow."""
    channels = 32 if n_embd < 384 else 64 if n_embd < 768 else 128
    most = max(1, n_embd // channels)
    return next(heads for heads in range(most, 0, -1) if n_embd % heads == 0)


# layers and width: 32 channels per layer, and 64 in larger networks, as in nanochat
SHAPES = [(n, 32 * n) for n in (2, 3, 4, 5, 6)] + [(6, 256)]
SHAPES += [(n, 64 * n) for n in (6, 8, 10, 12, 16, 20, 24, 28, 32)]
SIZES = [Size(layers, heads_of(width), width) for layers, width in SHAPES]


def parse_size(text: str) -> Size:
    """4/4/128 as a size. Raises ValueError."""
    n_layer, n_head, n_embd = map(int, text.split("/"))
    if min(n_layer, n_head, n_embd) < 1 or n_embd % n_head:
        raise ValueError(text)
    return Size(n_layer, n_head, n_embd)


def difficulty_of(text: bytes) -> float:
    """How hard a text is to predict, in bits per byte: the geometric mean of its size after bzip2 and of the
    entropy of a byte, given the two before it. The losses of models are nearer to it than to either."""
    pairs, triples = Counter(pairwise(text)), Counter(zip(text, text[1:], text[2:], strict=False))
    entropy = sum(n * math.log2(pairs[triple[:2]] / n) for triple, n in triples.items()) / max(1, len(text))
    return math.sqrt(entropy * 8 * len(bz2.compress(text)) / max(1, len(text)))


def best_tokenizer(characters: int) -> str:
    """The tokenizer that learns most from a text of that size in some minutes: a byte-pair encoding reads
    more of a large text in the same time, but has to read a short one more often."""
    return "char" if characters < CHARACTERS else "bpe:1024"


def effective_tokens(tokens: float, unique: float, worth: float) -> float:
    """How many different tokens teach as much as these, of which only some are different: each further pass
    over a text teaches less, and all of them as much as `worth` first ones (Muennighoff et al., 2023, arXiv
    2305.16264)."""
    if tokens <= unique:
        return tokens
    repeated = tokens / unique - 1
    return unique * (1 + worth * (1 - math.exp(-repeated / worth)))


def loss_by_law(millions: Any, megabytes: Any, law: dict[str, float]) -> Any:
    """The loss, divided by the text's difficulty, of models with these parameters after these different
    bytes; numbers or arrays. The form of Kaplan et al. (2020, arXiv 2001.08361, equation 1.5), with a floor,
    as in that of Hoffmann et al. (2022, arXiv 2203.15556)."""
    of_size = law["size"] * millions ** -law["size_power"]
    of_data = law["data"] * megabytes ** -law["data_power"]
    return law["floor"] + (of_size + of_data) ** law["power"]


def relative_loss(size: Size, text: Text, tokens: float, law: dict[str, float] = LAW) -> float:
    """The loss in bits per byte, divided by the text's difficulty, after training on these tokens."""
    effective_bytes = effective_tokens(tokens, text.tokens, law["passes"]) * text.bytes_per_token
    return loss_by_law(size.parameters(text.vocab_size) / 1e6, effective_bytes / 1e6, law)


def expected_loss(size: Size, text: Text, tokens: float) -> tuple[float, float]:
    """In nats per token, as train.py's losses, and in bits per byte; of a text whose difficulty is known."""
    bits = text.difficulty * relative_loss(size, text, tokens)
    return bits * text.bytes_per_token * math.log(2), bits


def recipe(
    size: Size, text: Text, tokens: float, ranks: int, on_gpu: bool, given: dict[str, Any]
) -> dict[str, Any]:
    """The settings with which this size is trained on that many tokens, beside those of config/modern.py.
    `given` may have block_size, batch_size and gradient_accumulation_steps."""
    shorter = max(1, min(text.tokens, text.val_tokens) - 1)
    block_size = min(256 if size.n_embd < 768 else 1024, 2 ** int(math.log2(shorter)))
    block_size = given.get("block_size", block_size)
    tokens_per_step = 1024 * max(1.0, tokens / 20e6) ** 0.5
    if on_gpu:  # on each: smaller batches do not fill it, and each computes all of Muon's update
        tokens_per_step = max(tokens_per_step, 16_384 * ranks)
    sequences = tokens_per_step / block_size / ranks  # of each rank
    micro_steps = given.get("gradient_accumulation_steps", ranks) / ranks
    batch_size = given.get("batch_size", max(1, round(sequences / micro_steps)))
    micro_steps = max(1, round(sequences / batch_size)) if "batch_size" in given else micro_steps
    # a model memorises a text if it has many parameters for each token and reads it often
    memorised = size.parameters(text.vocab_size) / text.tokens * tokens / text.tokens
    weight_decay = min(2.0, 0.1 * max(1.0, memorised / 8))
    return {
        **size._asdict(),
        "block_size": block_size,
        "batch_size": batch_size,
        "gradient_accumulation_steps": round(micro_steps * ranks),
        "weight_decay": round(weight_decay, 2),
        "sampling": "epochs",
    }
