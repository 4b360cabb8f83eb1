"""The bytes of tokens against what the tokenizer decodes."""

import re

import numpy as np
from pieces import Pieces
from support import engine_of

from mlx_dgemma.constraints.tokens import MAX_TOKEN_BYTES, TokenBytes


def test_tokens_spell_what_the_tokenizer_decodes(tokenizer, token_bytes):
    spelt = np.flatnonzero(token_bytes.length)
    assert len(spelt) > 1500
    for token in spelt:
        piece = tokenizer.convert_ids_to_tokens(int(token))
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # alone most are no text
            assert token_bytes.to_bytes([token]) == bytes([int(piece[3:5], 16)])
        else:
            assert token_bytes.to_bytes([token]) == tokenizer.decode([int(token)]).encode()


def test_texts_are_spelt_as_they_are_encoded(tokenizer, token_bytes):
    for text in (
        '{"name": "Anna", "age": 31}',
        "def add(a, b):\n    return a + b",
        "  Größe 日本 \U0001f600",
        "\t\n\n ",
    ):
        assert token_bytes.to_bytes(tokenizer.encode(text, add_special_tokens=False)).decode() == text


def test_special_and_unused_tokens_spell_nothing(tokenizer, token_bytes):
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer.get_vocab()))))
    unused = [token for token, piece in enumerate(pieces) if re.fullmatch(r"<unused\d+>", piece)]
    assert len(unused) > 100
    added = [token for token, one in tokenizer.added_tokens_decoder.items() if one.special]
    silent = {*tokenizer.all_special_ids, *unused, *added, 1, 16, 9}
    assert set(np.flatnonzero(token_bytes.length == 0).tolist()) == silent
    assert token_bytes.to_bytes(sorted(silent)) == b""
    starting = np.concatenate([token_bytes.starting_with(byte) for byte in range(256)])
    assert sorted(starting.tolist()) == np.flatnonzero(token_bytes.length).tolist()


def test_tokens_that_end_an_answer_spell_nothing(demo, token_bytes):
    """Or a text could hold a token at which its answer ends."""
    assert token_bytes.to_bytes(engine_of(demo).options.end_tokens) == b""


def test_pieces_of_a_tokenizer_are_spelt():
    long, longer = "é" * 32, "é" * 32 + "x"
    tokenizer = Pieces(
        "<s>", "▁a▁", "<0xC3>", "<0x61>", "a", "<0xc3>", "<unused7>", "<unusedx>", None, long, longer, ""
    )
    tokenizer.all_special_ids = [0]
    token_bytes = TokenBytes(tokenizer, 14)  # the vocabulary may be longer than the tokenizer
    expected = [b"", b" a ", b"\xc3", b"a", b"a", b"<0xc3>", b"", b"<unusedx>", b"", long.encode(), b"", b"", b"", b""]
    assert [token_bytes.to_bytes([token]) for token in range(14)] == expected
    assert token_bytes.length.tolist() == [len(one) for one in expected]
    assert MAX_TOKEN_BYTES == 64 == len(long.encode())
    assert token_bytes.starting_with(ord("a")).tolist() == [4, 3]  # a bare byte comes last
    assert token_bytes.starting_with(0xC3).tolist() == [9, 2]
    assert token_bytes.to_bytes([4, 1, 9, 0, 2]) == b"a a " + long.encode() + b"\xc3"
    assert TokenBytes(tokenizer, 3).length.tolist() == [0, 3, 1]  # or shorter
