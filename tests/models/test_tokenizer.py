"""The byte-level BPE tokenizer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.models import pystdlib, tokenizer
from qcompiler.models.tokenizer import Tokenizer

TRAINED = tokenizer.train(["def first(self):\n    return self.first\n\n\n" * 4, "class Ünïcode:\n    pass\n" * 3], 300)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_round_trip(data: bytes) -> None:
    for codec in (TRAINED, pystdlib.tokenizer()):
        ids = codec.encode(data)
        assert codec.decode_bytes(ids) == data
        assert all(0 <= value < codec.bos for value in ids)
        assert len(ids) <= len(data)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80) | st.text("ab_ \n=(é", max_size=80))
def test_any_text_round_trips(text: str) -> None:
    assert pystdlib.tokenizer().decode(pystdlib.tokenizer().encode(text)) == text


def test_lone_surrogates_encode() -> None:
    ids = TRAINED.encode("a\udc80")
    assert TRAINED.decode_bytes(ids) == b"a\xed\xb2\x80"
    assert TRAINED.decode(ids).startswith("a\ufffd")


def test_merges_are_learned_by_count() -> None:
    """Words: `ab` x 4, `abc` x 3. Pairs: (a, b) 7 times, then (ab, c) 3; both alone exhaust the pairs."""
    codec = tokenizer.train(["ab\n" * 4 + "abc\n" * 3], 400)
    assert codec.merges == ((97, 98), (256, 99))
    assert codec.vocab_size == 259
    assert codec.encode("abc ab") == [257, 32, 256]


def test_ties_go_to_the_smaller_ids() -> None:
    assert tokenizer.train(["xy\nab\n" * 2], 258).merges == ((97, 98),)


def test_earlier_merges_apply_first() -> None:
    """With (b, c) learned before (a, b), `abc` is `a` + `bc`."""
    codec = Tokenizer([(98, 99), (97, 98)])
    assert codec.encode("abc") == [97, 256]
    assert codec.encode("ab") == [257]


def test_training_is_deterministic() -> None:
    texts = ["import os\nimport sys\n", "def f(x):\n    return x\n"]
    assert tokenizer.train(texts, 280).merges == tokenizer.train(texts, 280).merges


def test_save_and_load(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json").merges == TRAINED.merges


def test_start_mark_has_no_bytes() -> None:
    assert TRAINED.bos == TRAINED.vocab_size - 1 == 256 + len(TRAINED.merges)
    assert TRAINED.decode_bytes([TRAINED.bos, 65]) == b"A"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no earlier merge"):
        Tokenizer([(97, 400)])
    with pytest.raises(ValueError, match="not in 0"):
        TRAINED.decode([TRAINED.vocab_size])
    with pytest.raises(ValueError, match="at least 257"):
        tokenizer.train(["x"], 100)
    (tmp_path / "other.json").write_text('{"type": "unigram"}')
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        Tokenizer.load(tmp_path / "other.json")


def test_committed_vocabulary() -> None:
    codec = pystdlib.tokenizer()
    assert codec.vocab_size == 1024
    assert len(codec.encode("def __init__(self):\n    return None\n")) <= 14
