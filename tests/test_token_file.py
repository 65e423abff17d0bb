"""Texts larger than memory: tokens in a file that is mapped."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pytest
import torch

from genkernels.data import (
    ByteTokenizer,
    CropBatches,
    InputError,
    MaskedBatches,
    SpanBatches,
    load_text,
    load_tokens,
    masked_windows,
    sequence_batches,
    token_file,
    train_tokenizer,
    write_tokens,
)

LINE = "  the cat\u0301 and the hat\r\n\n\nand\tthe  bat e\u0301\u0323 \u1112\u1161\u11ab "
LINE += "\U0001f600, "
TEXT = "\ufeff" + LINE * 9


@pytest.fixture(scope="module", params=["bytes", "bpe", "wide"])
def tokenizer(request):
    """256 tokens, a few more, whose ids take two bytes, and one id above what int16 has."""
    if request.param != "wide":
        return train_tokenizer(TEXT, 256 if request.param == "bytes" else 300)

    class Wide(ByteTokenizer):
        vocab_size = 1 << 16

        def encode(self, text):
            return (1 << 16) - 1 - super().encode(text)

    return Wide()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 18])
def test_pieces_are_together_the_whole(tmp_path, monkeypatch, tokenizer, size):
    """Cut within characters, accents, Hangul, line ends and words."""
    monkeypatch.setattr(token_file, "_PIECE", size)
    source, path = tmp_path / "notes.txt", tmp_path / "notes.tokens"
    source.write_text(TEXT, encoding="utf-8", newline="")
    write_tokens(path, source, tokenizer)
    tokens = load_tokens(path, tokenizer)
    assert tokens.dtype == (torch.uint8 if tokenizer.vocab_size == 256 else torch.uint16)
    assert torch.equal(tokens.long(), tokenizer.encode(load_text(source)))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "notes.tokens",
        "notes.tokens.json",
        "notes.txt",
    ], "and nothing else"


@pytest.fixture
def mapped(tmp_path):
    """The tokens of a text in memory, and of its file."""
    source, path = tmp_path / "notes.txt", tmp_path / "notes.tokens"
    generator = random.Random(0)
    source.write_bytes(bytes(generator.choices(range(32, 127), k=5000)))
    write_tokens(path, source, ByteTokenizer())
    return ByteTokenizer().encode(load_text(source)), load_tokens(path, ByteTokenizer())


def test_batches_are_those_of_the_text_in_memory(mapped):
    made = [
        [
            CropBatches(tokens, 4, 16, seed=1),
            sequence_batches(tokens, 4, 16),
            MaskedBatches(tokens, 4, 16, 256, seed=1),
            SpanBatches(tokens, 4, 16, 256, seed=1),
        ]
        for tokens in mapped
    ]
    for expected, found in zip(*made, strict=True):
        for step in (0, 1, 100):
            for left, right in zip(expected.batch(step), found.batch(step), strict=True):
                assert left.dtype == right.dtype == torch.int64
                assert torch.equal(left, right)
    expected, found = (masked_windows(tokens, 4, 16, 256)[0] for tokens in mapped)
    assert torch.equal(found[0], expected[0])


def test_what_is_written_to_the_tokens_does_not_reach_the_file(mapped, tmp_path):
    _, tokens = mapped
    before = (tmp_path / "notes.tokens").read_bytes()
    tokens.fill_(0)
    assert (tmp_path / "notes.tokens").read_bytes() == before


CHILD = """
import sys
from genkernels.data import ByteTokenizer, CropBatches, load_tokens, sequence_batches, write_tokens

def peak():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 1024

source, path = sys.argv[1:]
tokenizer = ByteTokenizer()
with open(source, "rb") as file:
    tokenizer.encode(file.read(1 << 18).decode())
before = peak()
write_tokens(path, source, tokenizer)
written = peak()
tokens = load_tokens(path, tokenizer)
crops, streams = CropBatches(tokens, 4, 64), sequence_batches(tokens, 4, 64)
for step in range(20):
    crops.batch(step), streams.batch(step)
print(len(tokens), len(streams), written - before, peak() - written)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/status, which tells the peak")
def test_a_large_file_is_not_read_whole(tmp_path):
    source, path = tmp_path / "large.txt", tmp_path / "large.tokens"
    line = b"The quick brown fox jumps over the lazy dog, again and again.\n"
    size = 50 << 20
    source.write_bytes(line * (size // len(line)))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    count, batches, writing, reading = map(float, child.stdout.split())
    assert count == source.stat().st_size
    assert batches == math.ceil((count - 1) // 4 / 64)
    # MiB. Fifty of text are a hundred and more when read whole, and four hundred of int64.
    assert writing < 20
    assert reading < 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "no text"),
        (b" \n\x00\r", "no text"),
        (b"abc\xff", r"not UTF-8 at byte 3 \(0xff\)"),
        (b"\xef\xbb\xbfok \xc3(", r"not UTF-8 at byte 6 \(0xc3\)"),
        (b"abcde \xe2\x82", r"not UTF-8 at byte 6 \(0xe2\)"),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 1 << 18])
def test_refuses_a_text_and_keeps_what_was_there(tmp_path, monkeypatch, content, message, size):
    path, source = tmp_path / "notes.tokens", tmp_path / "notes.txt"
    source.write_text("older")
    write_tokens(path, source, ByteTokenizer())
    source.unlink()
    if content is not None:
        source.write_bytes(content)
    monkeypatch.setattr(token_file, "_PIECE", size)
    with pytest.raises(InputError, match=message) as error:
        write_tokens(path, source, ByteTokenizer())
    assert str(source) in str(error.value)
    assert bytes(load_tokens(path, ByteTokenizer()).tolist()) == b"older"


def test_refuses_files_that_are_no_tokens(tmp_path):
    path, source = tmp_path / "notes.tokens", tmp_path / "notes.txt"
    header = tmp_path / "notes.tokens.json"

    def refused(message, tokenizer=None):
        with pytest.raises(InputError, match=message) as error:
            load_tokens(path, tokenizer or ByteTokenizer())
        assert str(path) in str(error.value)

    refused("No such file")
    source.write_text("some text")
    write_tokens(path, source, ByteTokenizer())
    refused("expected those of 'bpe'", train_tokenizer("some text", 257))
    whole, description = path.read_bytes(), json.loads(header.read_text())
    path.write_bytes(whole[:-1])
    refused("8 bytes; expected 9")
    path.unlink()
    refused("No such file")
    path.write_bytes(whole)
    for key, value in {"format": "x", "dtype": "int64", "count": -1, "vocab_size": 300}.items():
        header.write_text(json.dumps(description | {key: value}))
        refused("expected")
    header.write_text(json.dumps({k: v for k, v in description.items() if k != "count"}))
    refused("lacks 'count'")
    for text in ("", "[]", "{", '{"format": []}'):
        header.write_text(text)
        refused("not JSON|format is")


def test_refuses_more_tokens_than_two_bytes_tell_apart(tmp_path):
    class Large(ByteTokenizer):
        vocab_size = (1 << 16) + 1

    with pytest.raises(ValueError, match="65537"):
        write_tokens(tmp_path / "notes.tokens", tmp_path / "notes.txt", Large())
