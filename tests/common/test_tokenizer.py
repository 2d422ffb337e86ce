"""Tokenizers trained here against the library that trained them, and against tiktoken's GPT-2."""

import random
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest
import tiktoken
from transformers import AutoTokenizer

from common import tokenizer
from common.console import UserError
from common.huggingface import save_tokenizer
from common.text import pydoc_texts

ODD = (
    "naïve → 日本語 🙂 \u200b\u0000 x\r\n\r\n   \t\t  don't we'll I'VE 123456 ３４ ½ <|endoftext|> "
    + "a" * 500
    + "  "
)


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train_tokenizer(pydoc_texts(), 2048)


def unseen_text() -> str:
    """ODD and 1 MB of Python code, of which the tokenizer has seen at most the docstrings."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    return ODD + "".join(path.read_text("utf-8", "replace") for path in paths)[: 2**20]


def test_ids_equal_the_librarys_on_a_megabyte_of_unseen_text(trained):
    encoding, library = trained
    text = unseen_text()
    library.encode_special_tokens = True  # <|endoftext|> in a text is ordinary text
    assert encoding.encode_ordinary(text) == library.encode(text).ids
    assert encoding.decode(encoding.encode_ordinary(text)) == text


WHITESPACE = [
    " ", "  ", "\t", "\n", "\r", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000",
]  # fmt: skip
OTHERS = [
    *"aé1½!日🙂_", "Bc", "'s", "'LL", "\u200b", "\ufeff", "\x1c", "\u0301", "<|endoftext|>",
]  # fmt: skip


@pytest.mark.parametrize("has_null_characters", [False, True])
def test_texts_encoded_for_the_shards_have_tiktokens_ids(trained, has_null_characters):
    """Texts are cut at whitespace, unless one of the batch has a null character."""
    encoding, _ = trained
    rng = random.Random(0)
    pieces = WHITESPACE + OTHERS
    texts = ["", *("".join(rng.choices(pieces, k=rng.randrange(60))) for _ in range(3000))]
    texts.append(unseen_text().replace("\0", ""))
    if has_null_characters:
        texts += ["a\0  b", tokenizer.CUT + "  a  b", unseen_text()]
    ids, lengths = tokenizer.encode_texts(encoding, pa.array(texts, pa.string()))
    expected = [
        [encoding.eot_token, *encoding.encode_ordinary(text)] if text else [] for text in texts
    ]
    assert lengths == list(map(len, expected))
    assert ids.tolist() == [token for tokens in expected for token in tokens]


def test_every_whitespace_character_is_cut_as_gpt2s_pattern_splits_it(trained):
    """All whitespace characters below U+3100, and their neighbours."""
    encoding, _ = trained
    chars = {chr(c + d) for c in range(1, 0x3100) if chr(c).isspace() for d in (-1, 0, 1)} - {"\0"}
    texts = [f"a{first}{last}b" for first in sorted(chars) for last in (" ", "\t", first)]
    ids, _ = tokenizer.encode_texts(encoding, pa.array(texts, pa.string()))
    expected = [t for text in texts for t in (encoding.eot_token, *encoding.encode_ordinary(text))]
    assert ids.tolist() == expected


def test_a_run_of_whitespace_too_long_for_tiktoken_is_encoded(trained):
    encoding, _ = trained
    text = "a" + " " * 2_000_000 + "b"  # tiktoken's regex engine gives up: too much backtracking
    ids, _ = tokenizer.encode_texts(encoding, pa.array([text], pa.string()))
    assert encoding.decode(ids[1:].tolist()) == text


def test_ids_equal_the_librarys_on_web_text(trained, shared_data):
    import pyarrow.parquet as pq

    encoding, library = trained
    library.encode_special_tokens = True
    path = sorted((shared_data / "corpus").glob("*.parquet"))[0]
    for text in pq.read_table(path, columns=["text"])["text"][:200].to_pylist():
        assert encoding.encode_ordinary(text) == library.encode(text).ids


def test_end_of_text_is_the_last_token(trained):
    encoding, _ = trained
    assert encoding.n_vocab == 2048
    assert encoding.eot_token == 2047
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [2047]
    assert 2047 not in encoding.encode_ordinary("a<|endoftext|>b")


def test_training_again_gives_the_same_vocabulary(trained):
    again, _ = tokenizer.train_tokenizer(pydoc_texts(), 2048)
    assert tokenizer.tokenizer_to_text(again) == tokenizer.tokenizer_to_text(trained[0])


def test_a_vocabulary_file_gives_the_same_tokenizer(trained, tmp_path):
    (tmp_path / "vocab.tiktoken").write_text(tokenizer.tokenizer_to_text(trained[0]))
    loaded = tokenizer.load_tokenizer(tmp_path / "vocab.tiktoken")
    assert loaded.encode_ordinary(ODD) == trained[0].encode_ordinary(ODD)


def test_autotokenizer_loads_an_exported_tokenizer(trained, tmp_path):
    save_tokenizer(trained[0], tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    text = unseen_text()[:50_000].replace("<|endoftext|>", "")
    assert exported(text).input_ids == trained[0].encode_ordinary(text)
    assert exported.eos_token_id == trained[0].eot_token
    assert exported.decode(trained[0].encode_ordinary("naïve → 日本")) == "naïve → 日本"
    assert (
        tokenizer.load_tokenizer(tmp_path / "vocab.tiktoken").encode_ordinary(text)
        == exported(text).input_ids
    )


def test_gpt2s_files_are_recovered(tmp_path):
    try:
        gpt2 = tokenizer.load_tokenizer("gpt2")
    except OSError:
        pytest.skip("GPT-2's vocabulary is not available")
    assert tokenizer.tokenizer_to_text(gpt2) == "gpt2"
    save_tokenizer(gpt2, tmp_path)
    merges = (tmp_path / "merges.txt").read_text("utf-8").splitlines()
    assert merges[1:4] == ["Ġ t", "Ġ a", "h e"]
    assert len(merges) == 50001
    exported = AutoTokenizer.from_pretrained(tmp_path)
    text = unseen_text().replace("<|endoftext|>", "")
    assert (
        exported(text).input_ids
        == gpt2.encode_ordinary(text)
        == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    )


@pytest.mark.parametrize("text", ["", "words of prose", "AAAA 0\n", "IQ== 0\nIg== 0\n", "\xff\xfe"])
def test_a_file_that_is_not_a_vocabulary_is_rejected(text, tmp_path):
    (tmp_path / "vocab.tiktoken").write_text(text, "latin-1")
    with pytest.raises(UserError, match="vocab"):
        tokenizer.load_tokenizer(tmp_path / "vocab.tiktoken")


def test_a_vocabulary_that_can_not_be_learned_is_rejected():
    with pytest.raises(UserError, match="too small"):
        tokenizer.train_tokenizer(["text"], 256)
    with pytest.raises(UserError, match="lower the size"):
        tokenizer.train_tokenizer(["text"], 1000)
