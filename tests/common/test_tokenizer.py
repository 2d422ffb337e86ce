"""Tokenizers trained here against the library that trained them, and against tiktoken's GPT-2."""

import json
import pickle
import random
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest
import tiktoken
from conftest import TEXTS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from common import tokenizer
from common.console import UserError
from common.foreign import ForeignEncoding, byte_to_char
from common.huggingface import save_tokenizer
from common.pydoc_texts import help_topics

ODD = (
    "naïve → 日本語 🙂 \u200b\u0000 x\r\n\r\n   \t\t  don't we'll I'VE 123456 ３４ ½ <|endoftext|> "
    + "a" * 500
    + "  "
)


def some_texts() -> list[str]:
    """Python's help topics. (To parse the modules for their docstrings takes ten seconds.)"""
    return list(help_topics(Path(sysconfig.get_paths()["stdlib"])).values())


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train_tokenizer(some_texts(), 2048)


def unseen_text() -> str:
    """ODD and 1 MB of Python code, of which the tokenizer has seen at most the docstrings."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    return ODD + "".join(path.read_text("utf-8", "replace") for path in paths)[: 2**20]


@pytest.mark.slow
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
    again, _ = tokenizer.train_tokenizer(some_texts(), 2048)
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


@pytest.mark.slow
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

    # Read from Hugging Face's files, it is GPT-2's again.
    for file in ("vocab.tiktoken", "tokenizer.json"):
        (tmp_path / file).unlink()
        enc = tokenizer.load_tokenizer(tmp_path)
        assert tokenizer.tokenizer_to_text(enc) == "gpt2"
        assert enc.encode_ordinary(ODD) == gpt2.encode_ordinary(ODD)


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


# ---------------------------------------------------------------------------------------------
# Tokenizers of other models

# How Llama 3 splits texts
OTHER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["[PAD]", "</s>", "<|im_start|>", "<|endoftext|>"]


def train_foreign(pre_tokenizer=None, normalizer=None, special=(), added=(), alphabet=True):
    """A tokenizer of about 600 tokens that the library trains on our own texts."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if normalizer:
        library.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    library.train_from_iterator([*TEXTS[:2], "größer 日本語 🙂 naïve " * 50], trainer)
    library.add_special_tokens(list(added))
    return library


def save_foreign(library: Tokenizer, folder: Path, **settings):
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def mixed_texts(count: int, without=()) -> list[str]:
    """Random texts of blanks, words, special tokens and any Unicode characters, and code."""
    rng = random.Random(0)
    pieces = [*WHITESPACE, *OTHERS, *SPECIAL, "\0", "self", " def", "    ", "12345"]
    pieces = [piece for piece in pieces if piece not in without]
    texts = ["", " ", "a"]
    for _ in range(count):
        texts.append("".join(rng.choices(pieces, k=rng.randrange(40))))
        ranges = [(0, 128), (0, 0x800), (0, 0xD800), (0xE000, 0x110000)]
        texts.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(30)))
        start = rng.randrange(len(TEXTS[3]))
        texts.append(TEXTS[3][start : start + 300])
    return texts


def individual_digits():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def other_split():
    split = pre_tokenizers.Split(Regex(OTHER_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


EOT = ["<|endoftext|>"]
FOREIGN = {
    "like ours": (dict(added=EOT), {}),
    "end of text first": (dict(special=EOT), {}),
    "special tokens first and last": (
        dict(special=["<s>", "<pad>", "</s>"], added=["[PAD]", "<|im_start|>"]),
        dict(eos_token="</s>", pad_token="[PAD]"),
    ),
    "space before texts": (
        dict(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True), added=EOT),
        dict(eos_token=EOT[0]),
    ),
    "space before texts by the settings": (
        dict(added=EOT),
        dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
    ),
    "no space before texts by the settings": (
        dict(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True), added=EOT),
        dict(tokenizer_class="GPT2Tokenizer"),
    ),
    "another pattern": (dict(pre_tokenizer=other_split(), special=EOT), {}),
    "single digits": (dict(pre_tokenizer=individual_digits(), special=EOT), {}),
    "missing bytes": (dict(alphabet=False, added=EOT), {}),
    "normalizer": (dict(normalizer=normalizers.NFC(), added=EOT), {}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_ids_of_a_foreign_tokenizer_equal_autotokenizers(name, tmp_path):
    options, settings = FOREIGN[name]
    save_foreign(train_foreign(**options), tmp_path / "theirs", **settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    enc = tokenizer.load_tokenizer(tmp_path / "theirs")
    assert enc.n_vocab == len(theirs)
    assert enc.eot_token == theirs.convert_tokens_to_ids(settings.get("eos_token", EOT[0]))
    is_ours = name in ("like ours", "no space before texts by the settings")
    assert isinstance(enc, ForeignEncoding) != is_ours

    # As a checkpoint, an export and a worker process have it
    save_tokenizer(enc, tmp_path / "exported")
    copies = [
        enc,
        tokenizer.tokenizer_from_text(tokenizer.tokenizer_to_text(enc)),
        tokenizer.load_tokenizer(tmp_path / "exported"),
        pickle.loads(pickle.dumps(enc)),
    ]
    for copy in copies:
        assert tokenizer.tokenizer_to_text(copy) == tokenizer.tokenizer_to_text(enc)
        assert copy.eot_token == enc.eot_token
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.eos_token_id == enc.eot_token

    # For us, <|endoftext|> also means an end-of-text token by another name.
    texts = mixed_texts(40, without=EOT if enc.eot_token == 2 else ())
    for text in texts:
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = theirs(text, add_special_tokens=False).input_ids
        decoded = theirs.decode(ids, clean_up_tokenization_spaces=False)
        for copy in copies:
            assert copy.encode_ordinary(text) == plain
            assert copy.encode(text, allowed_special="all") == ids
            assert copy.decode(ids) == decoded
            assert b"".join(map(copy.decode_single_token_bytes, ids)) == copy.decode_bytes(ids)
        assert exported(text, add_special_tokens=False).input_ids == ids
    assert enc.encode(EOT[0], allowed_special="all")[-1] == enc.eot_token

    ids, lengths = tokenizer.encode_texts(enc, pa.array([None, *texts], pa.string()))
    expected = [[enc.eot_token, *enc.encode_ordinary(text)] if text else [] for text in texts]
    assert lengths == [0, *map(len, expected)]
    assert ids.tolist() == [token for tokens in expected for token in tokens]


def test_lone_surrogates_are_encoded_as_tiktoken_does(trained, tmp_path):
    save_foreign(train_foreign(special=EOT), tmp_path)
    enc = tokenizer.load_tokenizer(tmp_path)
    for tested in (enc, trained[0]):
        assert tested.decode(tested.encode_ordinary("a\ud800b")) == "a\ufffdb"


def test_a_tokenizer_takes_our_form_only_if_the_ids_are_the_same(tmp_path):
    """Random merges: a token may have several, in any order, or ones that never apply."""
    rng = random.Random(1)
    alphabet = byte_to_char().values()
    num_ours = 0
    for trial in range(300):
        vocab = {char: i for i, char in enumerate(alphabet)}
        merges = []
        tokens = list("abc")
        for _ in range(rng.randrange(1, 9)):
            left, right = rng.choices(tokens, k=2)
            if (left, right) in merges or len(left + right) > 6:
                continue
            merges.append((left, right))
            vocab.setdefault(left + right, len(vocab))
            tokens.append(left + right)
        if rng.random() < 0.1:
            rng.shuffle(merges)
        library = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.add_special_tokens(EOT)
        library.save(str(tmp_path / "tokenizer.json"))
        enc = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
        num_ours += not isinstance(enc, ForeignEncoding)
        for _ in range(40):
            text = "".join(rng.choices("aaabbc ", k=rng.randrange(30)))
            assert enc.encode_ordinary(text) == library.encode(text).ids
    assert 50 < num_ours < 290


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", ""])
def test_vocab_json_and_merges_txt_are_read(name, tmp_path):
    library = train_foreign(special=["<s>", "<pad>", "</s>"], added=["<mask>"])
    library.model.save(str(tmp_path))
    roles = dict(eos_token={"content": "</s>"}, bos_token="<s>", pad_token="<pad>")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mask>": 600}))
    enc = tokenizer.load_tokenizer(tmp_path / name)
    assert (enc.eot_token, enc.n_vocab) == (2, 601)
    for text in mixed_texts(30, without=EOT):
        library.encode_special_tokens = False
        assert enc.encode(text, allowed_special="all") == library.encode(text).ids
        library.encode_special_tokens = True
        assert enc.encode_ordinary(text) == library.encode(text).ids


def other_kinds():
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    byte_fallback = Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))
    characters = Tokenizer(models.BPE({"a": 0}, []))
    word_ends = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    return {
        "WordPiece": wordpiece,
        "Unigram": unigram,
        "byte fallback": byte_fallback,
        "BPE of characters": characters,
        "</w>": word_ends,
        "WordLevel": Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    }


@pytest.mark.parametrize("kind", other_kinds())
def test_other_kinds_of_tokenizers_are_rejected_by_name(kind, tmp_path):
    other_kinds()[kind].save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=kind) as info:
            tokenizer.load_tokenizer(path)
        assert str(tmp_path / "tokenizer.json") in str(info.value)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"vocab.txt": "[UNK]\n"}, "WordPiece"),
        ({"tokenizer.model": "x"}, "SentencePiece"),
        ({"vocab.json": "{}"}, "no merges.txt"),
        ({"merges.txt": ""}, "no vocab.json"),
        ({"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'}, "T5Tokenizer"),
        ({"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "#version\na b\n"}, "line 2"),
        ({"vocab.json": '{"a</w>": 0}', "merges.txt": ""}, "</w>"),
        ({"tokenizer.json": '{"model": '}, "tokenizer.json is damaged"),
        ({"tokenizer.json": "[]"}, "tokenizer.json is damaged"),
        ({"tokenizer.json": '{"model": {}}'}, "not a tokenizer"),
        ({"tokenizer.json": b"\xff\xfe\xfd"}, "tokenizer.json"),
        ({}, "has no tokenizer"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_rejected(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as info:
        tokenizer.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(info.value)


def test_damaged_settings_are_rejected(tmp_path):
    save_foreign(train_foreign(added=EOT), tmp_path, added_tokens_decoder={"x": 7})
    with pytest.raises(UserError, match="tokenizer_config.json is damaged"):
        tokenizer.load_tokenizer(tmp_path)
    # The library would number the token 601.
    fields = dict(content="[FAR]", special=True)
    save_foreign(train_foreign(added=EOT), tmp_path, added_tokens_decoder={"700": fields})
    with pytest.raises(UserError, match=r"\[FAR\].* 700"):
        tokenizer.load_tokenizer(tmp_path)


def test_the_end_of_text_token_must_be_known(tmp_path):
    save_foreign(train_foreign(added=["[SEP]", "[PAD]"]), tmp_path)
    with pytest.raises(UserError, match="eos_token") as info:
        tokenizer.load_tokenizer(tmp_path)
    assert "tokenizer_config.json" in str(info.value)
    # config.json of the model names it by its id; GPT-2's, which transformers fills in, is none.
    (tmp_path / "config.json").write_text(json.dumps(dict(eos_token_id=100)))
    with pytest.raises(UserError, match="eos_token"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(eos_token_id=600)))
    assert tokenizer.load_tokenizer(tmp_path).eot_token == 600
    save_foreign(train_foreign(added=["[SEP]", "[PAD]"]), tmp_path, eos_token="[PAD]")
    assert tokenizer.load_tokenizer(tmp_path).eot_token == 601


def test_settings_of_training_do_not_change_the_ids(tmp_path):
    """Truncation, padding and dropout may be saved in tokenizer.json."""
    library = train_foreign(special=EOT)
    expected = library.encode(ODD).ids
    library.enable_truncation(5)
    library.enable_padding(length=1000)
    library.model.dropout = 0.5
    save_foreign(library, tmp_path)
    enc = tokenizer.load_tokenizer(tmp_path)
    assert enc.encode(ODD, allowed_special="all") == expected


def test_an_unknown_tokenizer_is_an_os_error():
    with pytest.raises(OSError, match="give gpt2"):
        tokenizer.load_tokenizer("no-such-file.tiktoken")
    with pytest.raises(OSError, match="no-such-owner/no-such-model"):
        tokenizer.load_tokenizer("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    "text", ["{", '{"end_of_text": "a"}', '{"end_of_text": 1, "tokenizer": {}}']
)
def test_a_damaged_tokenizer_of_a_checkpoint_is_rejected(text):
    with pytest.raises(UserError, match="not a tokenizer"):
        tokenizer.tokenizer_from_text(text)
