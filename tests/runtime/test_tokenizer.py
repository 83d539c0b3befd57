"""Proves that ids equal transformers' and that pieces joined are the whole text, without a split
character, for byte-level and SentencePiece-style tokenizers:
python -m pytest tests/runtime/test_tokenizer.py
"""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_support import BOS, EOS, FIRST_BYTE, IMAGE, byte_ids, write_byte_tokenizer

from qvlm_runtime.tokenizer import Detokenizer, Tokenizer

TEXTS = [
    "plain",
    "  two  spaces ",
    "naïve café",
    "日本語 and 👩‍👩‍👧 family",
    "a\n\n\tb",
    "",
    "ÿ\u0301",
]


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    write_byte_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def piecewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama's arrangement: spaces are ▁, unknown characters are bytes, one leading space goes."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers

    words = ["▁", "▁two", "▁the", "tw", "o", "t", "w", "h", "e", "s", "▁s", "a", "p"]
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{b:02X}>": b + 2 for b in range(256)}
    vocab |= {word: 300 + i for i, word in enumerate(words)}
    fast = Fast(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["</s>"])
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.json"
    fast.save(str(path))
    return Tokenizer(path)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_ids_equal_transformers(bytewise: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "tokenizer.json"
    write_byte_tokenizer(path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="</s>")
    for text in [*TEXTS, "<s>a<image>\nb</s>"]:
        ids = bytewise.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert bytewise.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert bytewise.encode("<s>a<image></s>", False) == [BOS, *byte_ids("a"), IMAGE, EOS]
    assert bytewise.token(IMAGE) == "<image>" and bytewise.token(10**6) is None


def test_settings_of_training_neither_cut_nor_pad(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast

    path = tmp_path / "tokenizer.json"
    write_byte_tokenizer(path)
    fast = Fast.from_file(str(path))
    fast.enable_truncation(2)
    fast.enable_padding(length=9)
    fast.save(str(path))
    assert Tokenizer(path).encode("four", False) == byte_ids("four")


@pytest.mark.parametrize("kind", ["bytewise", "piecewise"])
@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_pieces_joined_are_the_text(kind: str, request: pytest.FixtureRequest, text: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    got = pieces(tokenizer, ids)
    if not whole.endswith("\ufffd"):  # a replacement character of the text itself is held back
        assert "".join(got) == whole
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@pytest.mark.parametrize("text", TEXTS)
def test_every_piece_is_given_as_soon_as_its_character_is_whole(
    bytewise: Tokenizer, text: str
) -> None:
    ids, at = bytewise.encode(text, False), 0
    for character, piece in zip(text, filter(None, pieces(bytewise, ids)), strict=True):
        assert piece == character
        at += len(character.encode())
    assert at == len(ids)


def test_special_tokens_give_no_text_and_keep_the_space_rule(piecewise: Tokenizer) -> None:
    the, end = 302, 1
    assert pieces(piecewise, [the, end, the, end]) == ["the", "", " the", "", ""]


def test_an_unfinished_character_at_the_end_is_dropped(bytewise: Tokenizer) -> None:
    euro = byte_ids("€")
    assert pieces(bytewise, [*byte_ids("a"), *euro[:2]]) == ["a", "", "", ""]
    assert "".join(pieces(bytewise, [*euro, *euro[:1]])) == "€"


def test_a_byte_that_can_never_be_text_stays_visible_in_the_middle(bytewise: Tokenizer) -> None:
    stray = FIRST_BYTE + 0xFF
    assert "".join(pieces(bytewise, [stray, *byte_ids("a")])) == "\ufffda"
