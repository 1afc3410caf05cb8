"""companion.data.batching: nothing lost, nothing doubled, everything one place apart."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.data.batching import (
    EncodedPair,
    Seq2SeqBatch,
    collate,
    encode_pairs,
    pad_sequences,
    seq2seq_batches,
    shift_right,
    token_batches,
)
from companion.data.translation import Pair

PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS}
ids = st.lists(st.integers(3, 50), min_size=1, max_size=9)
lengths = st.lists(st.integers(1, 30), min_size=1, max_size=80)


class Letters:
    """A tokenizer: one id a letter."""

    def encode_batch(self, texts):
        return [[3 + ord(letter) for letter in text] for text in texts]


# ------------------------------------------------------------------------------------------------- padding


@pytest.mark.verifies("companion.data.batching.pad_sequences", against="torch.nn.utils.rnn.pad_sequence")
@pytest.mark.parametrize("pad_id", [0, 7])
@pytest.mark.parametrize("sizes", [[1], [5], [3, 1, 7], [4, 4, 4]])
def test_pads_like_torch(agree, sizes, pad_id):
    sequences = [list(range(10 + size, 10 + 2 * size)) for size in sizes]
    judge = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=pad_id
    )
    mine = pad_sequences(sequences, pad_id)
    assert mine.dtype == torch.int64
    agree(mine, judge, tolerance=0, quantity="padded ids")


@pytest.mark.parametrize(
    "sequences, pad_id, error, message",
    [
        ([], 0, ValueError, "at least one sequence"),
        ([[1], []], 0, ValueError, r"sequences\[1\] must hold at least one id"),
        ([[1, 0]], 0, ValueError, r"sequences\[0\] must not hold pad_id, got 0 at place 1"),
        ([[1, -4]], 0, ValueError, "at least 0, got -4"),
        ([[1, 2.0]], 0, TypeError, "ints only, got float"),
        ([[True]], 0, TypeError, "ints only, got bool"),
        (["text"], 0, TypeError, "sequence of ints, got str"),
        ([3], 0, TypeError, "sequence of ints, got int"),
        ([[1]], -1, ValueError, "pad_id must be at least 0"),
        ([[1]], None, TypeError, "pad_id must be an int"),
    ],
)
def test_pad_refuses(sequences, pad_id, error, message):
    with pytest.raises(error, match=message):
        pad_sequences(sequences, pad_id)


# ------------------------------------------------------------------------------------------------ shifting


@given(ids)
def test_labels_are_what_the_decoder_reads_next(target):
    target_in, labels = shift_right(target, BOS, EOS)
    assert target_in[0] == BOS
    assert labels[-1] == EOS
    assert target_in[1:] == labels[:-1] == target


@pytest.mark.parametrize(
    "target, bos_id, eos_id, error, message",
    [
        ([], 1, 2, ValueError, "target_ids must hold at least one id"),
        ([5, 2], 1, 2, ValueError, "must not hold eos_id, got 2 at place 1"),
        ([1, 5], 1, 2, ValueError, "must not hold bos_id"),
        ([5], 1, 1, ValueError, "must differ, got 1 for both"),
        ([5], "1", 2, TypeError, "bos_id must be an int, got str"),
        (torch.tensor([5]), 1, 2, TypeError, "sequence of ints, got Tensor"),
    ],
)
def test_shift_refuses(target, bos_id, eos_id, error, message):
    with pytest.raises(error, match=message):
        shift_right(target, bos_id, eos_id)


# ------------------------------------------------------------------------------------------------- cutting


@pytest.mark.verifies("companion.data.batching.token_batches", against="enumeration")
@pytest.mark.parametrize("count, epoch", [(1, 0), (97, 0), (97, 3), (1000, 1)])
def test_an_epoch_is_a_permutation(agree, count, epoch):
    sizes = [1 + (i * i) % 31 for i in range(count)]
    batches = token_batches(sizes, 100, seed=5, epoch=epoch)
    seen = sorted(i for batch in batches for i in batch)
    agree(seen, list(range(count)), tolerance=0, quantity="indices seen")


@given(lengths, st.integers(30, 200), st.integers(0, 5), st.integers(0, 5))
def test_batches_keep_the_budget_and_the_order_of_lengths(sizes, max_tokens, seed, epoch):
    batches = token_batches(sizes, max_tokens, seed=seed, epoch=epoch)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(sizes)))
    assert all(len(batch) * max(sizes[i] for i in batch) <= max_tokens for batch in batches)
    spans = sorted((min(sizes[i] for i in batch), max(sizes[i] for i in batch)) for batch in batches)
    assert all(last <= first for (_, last), (first, _) in zip(spans, spans[1:], strict=False))  # bucketed
    assert batches == token_batches(sizes, max_tokens, seed=seed, epoch=epoch)


def test_epochs_and_seeds_differ():
    sizes = [1 + i % 7 for i in range(200)]
    results = {str(token_batches(sizes, 50, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}
    assert len(results) == 4


@pytest.mark.parametrize(
    "sizes, max_tokens, error, message",
    [
        ([], 10, ValueError, "at least one length"),
        ([3, 11], 10, ValueError, r"lengths\[1\] must be at most max_tokens \(10\), got 11"),
        ([0], 10, ValueError, r"lengths\[0\] must be at least 1"),
        ([2.0], 10, TypeError, "must be an int, got float"),
        ([2], 0, ValueError, "max_tokens must be at least 1"),
    ],
)
def test_token_batches_refuses(sizes, max_tokens, error, message):
    with pytest.raises(error, match=message):
        token_batches(sizes, max_tokens)


# ------------------------------------------------------------------------------------------------ batching


def _rows(batches):
    """The (source, target) rows of the batches that count for the loss, padding and specials removed."""
    return sorted(
        ([i for i in source if i != PAD], [i for i in target_in if i not in (PAD, BOS)])
        for batch in batches
        for source, target_in, labels in zip(*_lists(batch), strict=True)
        if any(i != PAD for i in labels)
    )


def _lists(batch):
    return batch.source.tolist(), batch.target_in.tolist(), batch.labels.tolist()


@settings(deadline=None)
@given(st.lists(st.builds(EncodedPair, ids, ids), min_size=1, max_size=25), st.integers(1, 5))
def test_processes_together_see_what_one_sees(pairs, world_size):
    def batches(rank, world_size):
        options = {**SPECIAL, "max_tokens": 40, "seed": 3, "epoch": 1, "rank": rank, "world_size": world_size}
        return list(seq2seq_batches(pairs, **options))

    alone = batches(0, 1)
    assert _rows(alone) == sorted((pair.source, pair.target) for pair in pairs)
    shares = [batches(rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(
        alone
    ):  # the same global batch at every step, and as many steps for everyone
        assert _rows(share[step] for share in shares) == _rows([batch])
        assert sum((share[step].labels != PAD).sum() for share in shares) == (batch.labels != PAD).sum()
    assert {len(share) for share in shares} == {len(alone)}


def test_a_batch_lines_up():
    batch = collate([EncodedPair([5, 6, EOS], [7]), EncodedPair([8, EOS], [9, 10, 11])], **SPECIAL)
    assert batch.source.tolist() == [[5, 6, EOS], [8, EOS, PAD]]
    assert batch.target_in.tolist() == [[BOS, 7, PAD, PAD], [BOS, 9, 10, 11]]
    assert batch.labels.tolist() == [[7, EOS, PAD, PAD], [9, 10, 11, EOS]]
    assert len(batch) == 2


def test_to_moves_every_tensor():
    moved = collate([EncodedPair([5], [7])], **SPECIAL).to("meta")
    assert isinstance(moved, Seq2SeqBatch)
    assert {moved.source.device.type, moved.target_in.device.type, moved.labels.device.type} == {"meta"}


def test_encode_pairs():
    pairs = [Pair("ab", "c", (1, 1, 1)), Pair("d", "ef", (1, 1, 2))]
    plain = encode_pairs(Letters(), pairs)
    assert [(len(pair.source), len(pair.target)) for pair in plain] == [(2, 1), (1, 2)]
    assert [pair.source[-1] for pair in encode_pairs(Letters(), pairs, eos_id=EOS)] == [EOS, EOS]
    assert encode_pairs(Letters(), pairs, eos_id=EOS)[0].source[:-1] == plain[0].source


def test_encode_pairs_refuses():
    with pytest.raises(ValueError, match="at least one pair"):
        encode_pairs(Letters(), [])
    with pytest.raises(ValueError, match=r"pairs\[1\] must have a token on both sides"):
        encode_pairs(Letters(), [Pair("a", "b", (1, 1, 1)), Pair("a", "", (1, 1, 2))])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 2, "world_size": 2}, ValueError, r"rank must be below world_size \(2\), got 2"),
        ({"rank": -1}, ValueError, "rank must be at least 0"),
        ({"rank": 0.0}, TypeError, "rank must be an int"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1"),
        ({"pad_id": BOS}, ValueError, "must differ, got 1, 1 and 2"),
        ({"max_tokens": 2}, ValueError, "at most max_tokens"),
    ],
)
def test_seq2seq_batches_refuses_at_once(options, error, message):
    with pytest.raises(error, match=message):
        seq2seq_batches([EncodedPair([5, 6], [7, 8])], **{**SPECIAL, "max_tokens": 100, **options})
    with pytest.raises(ValueError, match="at least one pair"):
        seq2seq_batches([], **SPECIAL, max_tokens=100)
    with pytest.raises(ValueError, match="at least one pair"):
        collate([], **SPECIAL)
