"""From lists of token ids to padded batches of about equally many tokens.

A batch is a rectangle: its cost is rows × longest row, and what is not text is padding. Sorting by length
before cutting keeps the padding small; a batch is then bounded by tokens rather than by sentences, as in
Vaswani et al. (2017, §5.1), whose batches held about 25,000 source and as many target tokens.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion._checks import check_positive
from companion.data.translation import Pair


@dataclass(frozen=True)
class Seq2SeqBatch:
    """What one training step of an encoder–decoder model takes; int64 ids.

    Attributes:
        source: (b, n), what the encoder reads.
        target_in: (b, m), what the decoder reads: ⟨bos⟩ y₁ … y_m₋₁.
        labels: (b, m), what it must answer: y₁ … y_m₋₁ ⟨eos⟩, padded like the others.
    """

    source: Tensor
    target_in: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """The number of sentences, b."""
        return len(self.source)

    def to(self, device, non_blocking: bool = False) -> "Seq2SeqBatch":
        """The same batch on another device."""
        tensors = (self.source, self.target_in, self.labels)
        return Seq2SeqBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of a source, which may end in ⟨eos⟩, and of a target without ⟨bos⟩ and ⟨eos⟩."""

    source: list[int]
    target: list[int]


def pad_sequences(sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Sequences of ids side by side, filled up on the right.

    Returns: int64 (b, longest).
    Raises: ValueError if there is no sequence, or one is empty or holds `pad_id` or a negative id; TypeError
    if an id is not an int.
    """
    _check_id("pad_id", pad_id)
    if len(sequences) == 0:
        raise ValueError("sequences must hold at least one sequence, got none")
    for row, sequence in enumerate(sequences):
        _check_sequence(f"sequences[{row}]", sequence)
        _check_absent(f"sequences[{row}]", sequence, "pad_id", pad_id)
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences])


def shift_right(target_ids: Sequence[int], bos_id: int, eos_id: int) -> tuple[list[int], list[int]]:
    """What the decoder reads and what it must answer, one place apart: (⟨bos⟩ y₁ … y_m, y₁ … y_m ⟨eos⟩).

    At position t the decoder sees ⟨bos⟩ y₁ … y_t₋₁ and is asked for y_t. Without the shift it would be asked
    for the token it is shown.

    Raises: ValueError if `target_ids` is empty or already holds one of the two; TypeError if an id is not an
    int.
    """
    _check_id("bos_id", bos_id)
    _check_id("eos_id", eos_id)
    if bos_id == eos_id:
        raise ValueError(f"bos_id and eos_id must differ, got {bos_id} for both")
    _check_sequence("target_ids", target_ids)
    _check_absent("target_ids", target_ids, "bos_id", bos_id)
    _check_absent("target_ids", target_ids, "eos_id", eos_id)
    return [bos_id, *target_ids], [*target_ids, eos_id]


def token_batches(
    lengths: Sequence[int], max_tokens: int, *, seed: int = 0, epoch: int = 0
) -> list[list[int]]:
    """Indices 0 … len(lengths) − 1, each once, in batches of similar length and at most `max_tokens` tokens.

    A batch of r rows costs r × its longest length, padding included. Indices are shuffled, sorted by length
    (so equal lengths mix anew every epoch), cut greedily, and the batches shuffled. The result depends on the
    arguments alone.

    Raises: ValueError if `lengths` is empty, or one is below 1 or above `max_tokens`; TypeError if one is not
    an int.
    """
    check_positive("max_tokens", max_tokens)
    if len(lengths) == 0:
        raise ValueError("lengths must hold at least one length, got none")
    for i, length in enumerate(lengths):
        check_positive(f"lengths[{i}]", length)
        if length > max_tokens:
            raise ValueError(f"lengths[{i}] must be at most max_tokens ({max_tokens}), got {length}")
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lengths.__getitem__)  # stable: ties keep the shuffled order
    batches: list[list[int]] = [[]]
    for index in order:  # lengths rise, so the next one is the longest of its batch
        if (len(batches[-1]) + 1) * lengths[index] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    rng.shuffle(batches)
    return batches


def encode_pairs(tokenizer, pairs: Sequence[Pair], *, eos_id: int | None = None) -> list[EncodedPair]:
    """Pairs of texts as pairs of ids; `eos_id`, where given, closes every source.

    The tokenizer needs `encode_batch(list of texts) → list of lists of ids`.

    Raises: ValueError if there is no pair, or a text has no token.
    """
    if len(pairs) == 0:
        raise ValueError("pairs must hold at least one pair, got none")
    if eos_id is not None:
        _check_id("eos_id", eos_id)
    ending = [] if eos_id is None else [eos_id]
    sources = tokenizer.encode_batch([pair.source for pair in pairs])
    targets = tokenizer.encode_batch([pair.target for pair in pairs])
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if not source or not target:
            raise ValueError(f"pairs[{i}] must have a token on both sides, got {pairs[i]!r}")
    return [EncodedPair([*s, *ending], list(t)) for s, t in zip(sources, targets, strict=True)]


def collate(pairs: Sequence[EncodedPair], *, pad_id: int, bos_id: int, eos_id: int) -> Seq2SeqBatch:
    """Encoded pairs as one padded batch.

    Raises: ValueError if there is no pair, or what `pad_sequences` and `shift_right` refuse.
    """
    if len(pairs) == 0:
        raise ValueError("pairs must hold at least one pair, got none")
    shifted = [shift_right(pair.target, bos_id, eos_id) for pair in pairs]
    return Seq2SeqBatch(
        source=pad_sequences([pair.source for pair in pairs], pad_id),
        target_in=pad_sequences([read for read, _ in shifted], pad_id),
        labels=pad_sequences([answer for _, answer in shifted], pad_id),
    )


def seq2seq_batches(
    pairs: Sequence[EncodedPair],
    *,
    max_tokens: int,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Seq2SeqBatch]:
    """One epoch of batches; under `torchrun`, process `rank`'s share of each.

    The global batches are those of one process, cut by `token_batches` from the longer of the two sides,
    ⟨bos⟩ or ⟨eos⟩ included; process r takes rows r, r + w, r + 2w, … of each. A process left without a row
    gets one that is not counted: ⟨eos⟩ → ⟨bos⟩ with ⟨pad⟩ for a label. Sums over labels that are not
    `pad_id`, and their number, thus add up over w processes to those of one.

    Raises: ValueError on an empty list of pairs, a rank outside 0 … world_size − 1, or a pair longer than
    `max_tokens`.
    """
    check_positive("world_size", world_size)
    _check_id("rank", rank)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size ({world_size}), got {rank}")
    for name, id_ in (("pad_id", pad_id), ("bos_id", bos_id), ("eos_id", eos_id)):
        _check_id(name, id_)
    if len({pad_id, bos_id, eos_id}) < 3:
        raise ValueError(f"pad_id, bos_id and eos_id must differ, got {pad_id}, {bos_id} and {eos_id}")
    if len(pairs) == 0:
        raise ValueError("pairs must hold at least one pair, got none")
    lengths = [max(len(pair.source), len(pair.target) + 1) for pair in pairs]
    batches = token_batches(lengths, max_tokens, seed=seed, epoch=epoch)
    uncounted = Seq2SeqBatch(torch.tensor([[eos_id]]), torch.tensor([[bos_id]]), torch.tensor([[pad_id]]))
    return (
        collate([pairs[i] for i in rows], pad_id=pad_id, bos_id=bos_id, eos_id=eos_id) if rows else uncounted
        for rows in (batch[rank::world_size] for batch in batches)
    )


def _check_id(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _check_sequence(name: str, sequence: Sequence[int]) -> None:
    if isinstance(sequence, str | bytes) or not isinstance(sequence, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {type(sequence).__name__}")
    if len(sequence) == 0:
        raise ValueError(f"{name} must hold at least one id, got none")
    if wrong := set(map(type, sequence)) - {int}:
        kinds = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise TypeError(f"{name} must hold ints only, got {kinds}")
    if min(sequence) < 0:
        raise ValueError(f"{name} must hold ids of at least 0, got {min(sequence)}")


def _check_absent(name: str, sequence: Sequence[int], special: str, id_: int) -> None:
    if id_ in sequence:
        raise ValueError(f"{name} must not hold {special}, got {id_} at place {list(sequence).index(id_)}")
