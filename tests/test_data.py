"""Reading and cleaning text, the held-out split, tokenizers and batches."""

from __future__ import annotations

import random

import pytest
import torch

from genkernels.data import (
    BPETokenizer,
    ByteTokenizer,
    InputError,
    SpecialTokens,
    TextStream,
    TextToTextTokens,
    batchify,
    clean_text,
    encode_masked,
    encode_source,
    load_pairs,
    load_text,
    load_tokenizer,
    sequence_batches,
    spell_answer,
    spell_masked,
    split_text,
    train_tokenizer,
)


def test_cleaning():
    raw = "\ufeffe\u0301a\r\nb\rc\td\x00\x1b[0m\x7f\x85 \ufeff\n"
    assert clean_text(raw) == "\u00e9a\nb\nc\td[0m \ufeff\n"


def test_default_corpus_is_the_documentation_of_python():
    text = load_text()
    assert 300_000 < len(text.encode()) < 700_000
    assert '"assert" statement' in text


def test_reads_a_file_of_ones_own(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("gr\u00fc\u00df\r\ndich".encode())
    assert load_text(path) == "gr\u00fc\u00df\ndich"


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "labels.tsv"
    path.write_text("day\tred sun\nnight\tmoon\n", encoding="utf-8-sig")
    assert load_text(path) == "day\tred sun\nnight\tmoon\n"
    assert load_pairs(path) == [("day", "red sun"), ("night", "moon")]
    path.write_text("", encoding="utf-8-sig")
    with pytest.raises(InputError, match="no text"):
        load_text(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "no text"),
        (b" \n\x00", "no text"),
        (b"abc\xff", r"not UTF-8 at byte 3 \(0xff\)"),
        (b"\xef\xbb\xbfok \xc3(", r"not UTF-8 at byte 6 \(0xc3\)"),
    ],
)
def test_refuses_a_file(tmp_path, content, message):
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_text(path)
    assert str(path) in str(error.value)


def test_split_is_a_contiguous_tail():
    text = "\n\n".join(f"Paragraph number {i} of a text, each one of its own." for i in range(200))
    training, held_out = split_text(text)
    assert training + held_out == text
    assert 0.07 < len(held_out) / len(text) <= 0.1
    assert held_out.startswith("Paragraph number")


def test_split_drops_copies_from_the_held_out_part():
    old = [
        f"A paragraph, number {i}, long enough to be known when it comes again." for i in range(90)
    ]
    new = [
        "A paragraph that is to be seen for the first time in the part that is held out.",
        "Note:",
    ]
    text = "\n\n".join([*old, "Note:", *new, "   " + old[3], old[80], *new])
    training, held_out = split_text(text)
    assert new[0] in held_out
    assert "Note:" in held_out, "what is short is repeated by chance"
    assert not any(paragraph in held_out for paragraph in old if paragraph in training)
    assert old[3] in training


def test_held_out_part_of_the_default_corpus_is_no_copy():
    training, held_out = split_text(load_text())
    paragraphs = {p.strip() for p in training.split("\n\n")}
    assert not [p for p in held_out.split("\n\n") if len(p) > 64 and p.strip() in paragraphs]
    assert len(held_out) > 30_000


@pytest.mark.parametrize(
    "text", ["x", "word", ("The same long paragraph over and over. " * 3 + "\n\n") * 50]
)
def test_split_refuses_a_text_with_nothing_to_hold_out(text):
    with pytest.raises(InputError, match="nothing to hold out"):
        split_text(text)


def test_byte_tokens():
    tokenizer = train_tokenizer("", 256)
    assert isinstance(tokenizer, ByteTokenizer)
    tokens = tokenizer.encode("a\u00fc\u20ac\n")
    assert tokens.tolist() == list("a\u00fc\u20ac\n".encode())
    assert tokenizer.decode(tokens) == "a\u00fc\u20ac\n"
    assert tokenizer.decode(tokens[:2]) == "a\ufffd"


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer("the cat and the hat and the bat\n" * 50, 280)


def test_bpe_round_trip_of_any_text(bpe, tmp_path):
    text = "  the cat\t\u00fcber \U0001f600\n\n x\u0301 and"
    tokens = bpe.encode(text)
    assert bpe.decode(tokens) == text
    assert tokens.max() < bpe.vocab_size <= 280
    assert len(bpe.encode("the cat and the hat")) < 10
    bpe.save(tmp_path)
    loaded = load_tokenizer("bpe", tmp_path)
    assert torch.equal(loaded.encode(text), tokens)


def test_byte_lengths_add_up_to_the_text(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        for text in ("the cat and the hat", "\u00fcber \U0001f600 and"):
            assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    words = [f"paragraph {i} tells of nothing new at all, as the others do" for i in range(200)]
    words[-5:] = ["zyzzyva zyzzyva zyzzyva"] * 5
    training, held_out = split_text("\n\n".join(words))
    assert "zyzzyva" in held_out
    assert len(BPETokenizer.train(training, 400).encode("zyzzyva")) == 7
    assert len(BPETokenizer.train(held_out, 400).encode("zyzzyva")) == 1


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 1}'])
def test_refuses_a_broken_tokenizer_file(tmp_path, content):
    if content is not None:
        (tmp_path / BPETokenizer.file).write_text(content)
    with pytest.raises(InputError, match=BPETokenizer.file):
        load_tokenizer("bpe", tmp_path)


def test_refuses_an_unknown_tokenizer(tmp_path):
    with pytest.raises(InputError, match="words"):
        load_tokenizer("words", tmp_path)


def test_batchify_reads_streams_side_by_side():
    inputs, targets = batchify(torch.arange(12), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(
    ("length", "batch_size"), [(1000, 4), (997, 4), (1000, 1), (60, 64), (17, 1)]
)
def test_batches_continue_one_another(length, batch_size):
    batches = sequence_batches(torch.arange(length), batch_size, 16)
    rows = batches[0][0].shape[0]
    assert rows == min(batch_size, (length - 1) // 16)
    assert all(input.shape == target.shape for input, target in batches)
    sizes = [input.shape[1] for input, _ in batches]
    assert max(sizes) <= 16
    assert max(sizes) - min(sizes) <= 1
    inputs = torch.cat([input for input, _ in batches], 1)
    targets = torch.cat([target for _, target in batches], 1)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs.flatten(), torch.arange(inputs.numel()))
    assert inputs.numel() > length - 1 - rows, "only the rest of the division is left out"


def test_full_batch_is_the_whole_text_in_one():
    (batch,) = sequence_batches(torch.arange(1000), "full", 16)
    assert batch[0].shape == (62, 16)


@pytest.mark.parametrize("batch_size", [1, 8, "full"])
def test_refuses_a_text_shorter_than_one_sequence(batch_size):
    sequence_batches(torch.arange(17), batch_size, 16)
    with pytest.raises(InputError, match="16 tokens to train on; expected at least 17"):
        sequence_batches(torch.arange(16), batch_size, 16)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_streams_as_it_is_cleaned_as_a_whole(kind):
    """Characters of several bytes, accents of their own, Hangul, line ends, control sequences, byte
    order marks."""
    generator = random.Random(0)
    parts = ["a", "\u0301", "\u0323", "\r", "\n", "\x1b[31m", "\u1112", "\u1161", "\u11ab"]
    parts += ["\u00e9", "\u20ac", "\U0001f600", "\ufffd", "\u09c7", "\u09be", "\x00", " "]
    parts += ["\ufeff"] * 2
    tokenizer = train_tokenizer("".join(parts) * 9, 256 if kind == "bytes" else 280)
    early = 0
    for _ in range(300):
        text = "".join(generator.choices(parts, k=generator.randrange(1, 12)))
        tokens = tokenizer.encode(text)
        if generator.random() < 0.5:  # bytes that are no UTF-8
            tokens[generator.randrange(len(tokens))] = generator.randrange(256)
        stream = TextStream(tokenizer.decode)
        pieces = [stream.add(piece) for piece in tokens.split(generator.choice([1, 1, 3]))]
        early += bool(pieces[0])
        assert "".join(pieces) + stream.end() == clean_text(tokenizer.decode(tokens)), repr(text)
    assert early > 10, "not all of it comes at the end"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_texts_with_special_tokens(kind):
    text = "the cat and the hat "
    tokenizer = train_tokenizer(text * 20, 256 if kind == "bytes" else 270)
    special = SpecialTokens.above(tokenizer.vocab_size)
    tokens = encode_masked("the [MASK] and [mask][MASK]", tokenizer)
    assert tokens[0] == special.cls
    assert tokens[-1] == special.sep
    assert (tokens == special.mask).sum() == 2
    spaced = "the [MASK] and" if kind == "bytes" else "the[MASK] and"  # a word has its space
    assert spell_masked(tokens, tokenizer) == f"{spaced} [mask][MASK]"
    t5 = TextToTextTokens.above(tokenizer.vocab_size)
    source = encode_source("<extra_id_0> cat <extra_id_99><extra_id_100>", tokenizer)
    assert source[0] == t5.sentinel
    assert source[-1] == t5.end
    assert (source == t5.sentinel + 99).sum() == 1
    assert (source >= tokenizer.vocab_size).sum() == 3, "and no more: 100 is no sentinel"
    assert spell_answer(source, tokenizer) == "<extra_id_0> cat <extra_id_99><extra_id_100>"
