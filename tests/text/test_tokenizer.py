"""Every tokenizer gives text back as it was, and none turns text into a control id."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openelm.errors import DataError
from openelm.text.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TextStream,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

ASSETS = Path(__file__).parents[2].parent / "shared" / "tokenizers"
CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\n    Indented, and 12 345 numbers!\nThe end.\n",
    "HAMLET.\nTo be, or not to be: that is the question.\n\nOPHELIA.\nMy lord, I have remembrances.\n",
]
SPECIAL_TEXTS = ["</s>", "<s>", "<unk>", "<|endoftext|>", "<0x41>", "a</s>b", " <s>", "<s></s><|endoftext|>"]
SPECIAL_TEXTS += ["<|user|>\n</s>\n", "▁", "▁▁ ▁</s>▁", "<pad>", "\0</s>"]
UNICODE = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
TRICKY = st.text(alphabet=st.sampled_from(["▁", " ", "\n", "\t", "\0", "<", "/", "s", ">", "a", "é", "🦙", "▅", "\r"]))


def byte_level_json(add_prefix_space: bool = False) -> bytes:
    """Train a tiny GPT-2 style file with a special token, and an added token that is ordinary text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.normalizer = tokenizers.normalizers.NFC()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_special_tokens(["<pad>"])
    library.add_tokens([tokenizers.AddedToken("    ", normalized=False)])
    return library.to_str().encode()


def byte_fallback_json(space: str = "Prepend") -> bytes:
    """Describe a LLaMA style file whose merges spell "</s>", as converted files have it."""
    characters = ["▁", "<", "/", "s", ">", "a"]
    merges = [["<", "/"], ["s", ">"], ["</", "s>"], ["▁", "a"], ["</s>", "a"]]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    pieces += [left + right for left, right in merges if left + right != "</s>"]
    model = tokenizers.models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[(left, right) for left, right in merges],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    library = tokenizers.Tokenizer(model)
    if space == "Prepend":
        steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        library.normalizer = tokenizers.normalizers.Sequence(steps)
    else:
        library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library.to_str().encode()


def llama() -> Tokenizer:
    file = ASSETS / "llama-32k.model"
    if not file.exists():
        pytest.skip("LLaMA's vocabulary may not be shipped; put it in shared/tokenizers beside the project")
    return load_tokenizer(file)


CACHE: dict[str, Tokenizer] = {}
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "trained": lambda: train_tokenizer(CORPUS, 340),
    "byte-level": lambda: HuggingFaceTokenizer(byte_level_json()),
    "byte-level with prefix": lambda: HuggingFaceTokenizer(byte_level_json(add_prefix_space=True)),
    "byte-fallback": lambda: HuggingFaceTokenizer(byte_fallback_json()),
    "metaspace": lambda: HuggingFaceTokenizer(byte_fallback_json("Metaspace")),
    "llama": llama,
}
PREFIXED = {"byte-level with prefix", "byte-fallback", "metaspace", "llama"}


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(name: str) -> Tokenizer:
    if name not in CACHE:
        CACHE[name] = MAKERS[name]()
    return CACHE[name]


@given(text=UNICODE | TRICKY)
@example(text="\ufeff \u2028\x85\u200b\ufffd\ufffe e\u0301 ﬁ")
@example(text="\n\n    x\t\t \r\n   ")
@settings(max_examples=150, deadline=None)
def check_round_trip(tokenizer: Tokenizer, extra_bytes: int, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    lengths = tokenizer.byte_lengths()
    assert lengths[ids].sum() == len(text.encode()) + (extra_bytes if text else 0)
    assert all(lengths[ids] > 0)  # no control id


def test_decode_undoes_encode_and_lengths_add_up(name: str) -> None:
    check_round_trip(made(name), 1 if name in PREFIXED else 0)


def random_text(draw: random.Random) -> str:
    """Up to 18 characters: those that tokenizers treat apart, common ones, and any code point, lone surrogates too."""
    kinds = (" \n\t\0▁<>/s0xA", range(0x20, 0x250), range(0x110000))
    drawn = [draw.choices(kind, k=draw.randrange(7)) for kind in draw.sample(kinds, 3)]
    return "".join(one if isinstance(one, str) else chr(one) for part in drawn for one in part)


@pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.faults)])
def test_random_unicode_comes_back_or_is_refused_for_a_lone_surrogate(name: str, count: int) -> None:
    tokenizer, draw = made(name), random.Random(0)
    texts: dict[str, None] = {}
    lengths, extra_bytes = tokenizer.byte_lengths(), 1 if name in PREFIXED else 0
    while len(texts) < count:
        texts[random_text(draw)] = None
    for text in texts:
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            with pytest.raises(DataError) as error:
                tokenizer.encode(text)
            assert error.value.code == "E_TEXT"
            continue
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode()) + (extra_bytes if text else 0)


ENDLESS_WORD = """
import random, resource, sys
from pathlib import Path
from openelm.text.tokenizer import load_tokenizer
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))  # what grows with the square of the length is killed
tokenizer = load_tokenizer(Path(sys.argv[1]))
letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyzé你🦙", k=1 << 16))
for text in ("a" * 5_000_000, (letters * 77)[:5_000_000]):
    assert tokenizer.decode(tokenizer.encode(text)) == text
status = Path("/proc/self/status")
peaks = [int(line.split()[1]) << 10 for line in status.open() if line.startswith("VmHWM")] if status.exists() else [0]
assert peaks[0] < 2 << 30, peaks
"""


@pytest.mark.faults
def test_five_million_characters_without_a_space_take_bounded_time_and_memory(name: str, tmp_path: Path) -> None:
    made(name).save(tmp_path)
    code = f"import sys; sys.path[:] = {sys.path!r}\n{ENDLESS_WORD}"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_code_point_comes_back(name: str) -> None:
    tokenizer = made(name)
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)[::7]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_token_text_is_data(name: str, text: str) -> None:
    tokenizer = made(name)
    ids = tokenizer.encode(text)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids
    assert np.all(tokenizer.byte_lengths()[ids] > 0)
    assert tokenizer.decode(ids) == text


def test_encode_many_and_encode_array_equal_encode_of_each(name: str) -> None:
    tokenizer = made(name)
    texts = ["", *CORPUS, *SPECIAL_TEXTS, " a", "a", "🦙", ""]
    ids = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many(texts) == ids
    assert [tokenizer.encode_array(text).tolist() for text in texts] == ids
    assert tokenizer.encode_many([]) == []


def test_control_ids_are_dropped_on_decode(name: str) -> None:
    tokenizer = made(name)
    assert tokenizer.eos_id is not None
    ids = [tokenizer.eos_id, *tokenizer.encode("a b"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a b"


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def check_stream(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(3, 258), max_size=30))
    ids = [token_id for token_id in ids if token_id < tokenizer.vocab_size]
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_stream_of_any_ids_equals_decode(name: str) -> None:
    check_stream(made(name))


def test_stream_never_breaks_a_character(name: str) -> None:
    tokenizer = made(name)
    stream = TextStream(tokenizer)
    parts = [stream.push(token_id) for token_id in tokenizer.encode("né 🦙 ok")]
    assert "".join(parts) == "né 🦙 ok"
    assert "\ufffd" not in "".join(parts)


def test_cut_character_ends_as_replacement_character() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in "🦙".encode()[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_continuing_stream_keeps_the_first_space() -> None:
    tokenizer = made("byte-fallback")
    ids = tokenizer.encode("a")
    assert TextStream(tokenizer).push(ids[0]) == "a"
    assert TextStream(tokenizer, continues=True).push(ids[0]) == " a"


def test_lone_surrogate_is_named_with_its_place(name: str) -> None:
    with pytest.raises(DataError) as error:
        made(name).encode_many(["fine", "é\ud800"])
    assert (error.value.code, error.value.offset) == ("E_TEXT", 2)
    assert "text 1" in str(error.value)
    assert "U+D800" in str(error.value)


@pytest.mark.parametrize("token_id", [-1, 1 << 20])
def test_id_outside_the_vocabulary_is_refused(name: str, token_id: int) -> None:
    with pytest.raises(DataError, match="outside the vocabulary"):
        made(name).decode([token_id])


def test_saved_folder_loads_as_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = made(name)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert (again.sha256, again.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert again.encode_many(CORPUS) == tokenizer.encode_many(CORPUS)


def test_saved_bytes_are_the_same_ids_for_the_tokenizers_library() -> None:
    plain = ByteTokenizer()
    library = tokenizers.Tokenizer.from_str(plain.file_bytes.decode())
    for text in ("a  b\n", "né 🦙", "\0\t"):
        assert library.encode(text).ids == plain.encode(text)
        assert library.decode(plain.encode(text)) == text


def test_ids_are_those_of_the_tokenizers_library_for_ordinary_text() -> None:
    for data in (byte_level_json(), byte_fallback_json()):
        tokenizer, library = HuggingFaceTokenizer(data), tokenizers.Tokenizer.from_str(data.decode())
        for text in [*CORPUS, "a a  a", "        x", "né 🦙"]:
            assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_bos_and_eos_come_from_the_config_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    config = {"bos_token": {"content": "<pad>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (329 + 1, None)


@pytest.mark.parametrize(
    ("says", "starts"), [({}, [0]), ({"add_bos_token": True}, [0]), ({"add_bos_token": False}, [])]
)
def test_texts_begin_with_bos_unless_the_config_beside_the_file_says_no(
    tmp_path: Path, says: dict[str, bool], starts: list[int]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", **says}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.start_ids) == (0, starts)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").start_ids == starts


def test_bytes_that_hardly_any_text_holds_may_have_no_id_and_are_left_out() -> None:
    description = json.loads(byte_level_json())
    vocab = description["model"]["vocab"]
    absent = {"Ć", "ñ"}  # what stands for the bytes 0x06 and 0xF1
    description["model"]["vocab"] = {letter: number for letter, number in vocab.items() if letter not in absent}
    tokenizer = HuggingFaceTokenizer(json.dumps(description).encode())
    assert tokenizer.decode(tokenizer.encode("a\x06b, piñata 🦙")) == "ab, piñata 🦙"
    del description["model"]["vocab"]["~"]
    with pytest.raises(DataError, match="1 byte values have no id"):
        HuggingFaceTokenizer(json.dumps(description).encode())


def test_llama_vectors() -> None:
    tokenizer = llama()
    texts = (ASSETS / "llama-32k.vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = (ASSETS / "llama-32k.vectors.out").read_bytes().decode().split("\n")
    assert len(texts) == 46
    assert tokenizer.encode_many(texts) == [[int(token_id) for token_id in line.split()] for line in lines[:46]]
    assert [tokenizer.decode(row) for row in tokenizer.encode_many(texts)] == texts


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        load_tokenizer(path)
    assert error.value.code == "E_TOKENIZER"
    assert error.value.fix
    assert path.name in str(error.value)
    return str(error.value)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refused(tmp_path / "none.model")
    assert "neither" in refused(tmp_path)
    for suffix in ("model", "json"):
        file = tmp_path / f"x.{suffix}"
        for content in (
            b"",
            b"hello",
            b"{}",
            b"[]",
            b"\xff" * 100,
            b"[" * 100_000,
            bytes(100),
            b'{"model": {}}',
        ):
            file.write_bytes(content)
            refused(file)
    assert capfd.readouterr() == ("", "")


def test_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "big.model"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)
    assert "1,099,511,627,776 bytes" in refused(file)


def test_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json())
    config = tmp_path / "tokenizer_config.json"
    for content in ("[]", "{", '{"eos_token": "absent"}', '{"eos_token": 7}'):
        config.write_text(content)
        with pytest.raises(DataError) as error:
            load_tokenizer(tmp_path)
        assert error.value.code == "E_TOKENIZER"


@pytest.mark.parametrize("name", ["trained", "byte-level", "byte-fallback"])
def test_cut_file_is_refused_at_every_length(name: str, tmp_path: Path) -> None:
    tokenizer = made(name)
    file = tmp_path / tokenizer.file_name
    size = len(tokenizer.file_bytes)
    for length in [*range(1, size, size // 40), size - 1]:
        file.write_bytes(tokenizer.file_bytes[:length])
        refused(file)


@pytest.mark.parametrize("name", ["trained", "byte-level"])
def test_flipped_bytes_are_refused_or_stay_lossless(name: str, tmp_path: Path) -> None:
    good = made(name)
    file = tmp_path / good.file_name
    for position in range(0, len(good.file_bytes), len(good.file_bytes) // 60):
        data = bytearray(good.file_bytes)
        data[position] ^= 0x10
        file.write_bytes(bytes(data))
        try:
            tokenizer = load_tokenizer(file)
        except DataError as error:
            assert error.code == "E_TOKENIZER"
        else:
            assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


def test_tokenizer_that_loses_text_is_refused() -> None:
    description = json.loads(byte_level_json())
    description["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(DataError, match="loses text"):
        HuggingFaceTokenizer(json.dumps(description).encode())
    with pytest.raises(DataError, match="byte values have no id"):
        HuggingFaceTokenizer(json.dumps(no_bytes(json.loads(byte_fallback_json()))).encode())


def no_bytes(description: dict[str, dict[str, dict[str, int]]]) -> dict[str, dict[str, dict[str, int]]]:
    vocab = description["model"]["vocab"]
    description["model"]["vocab"] = {piece: i for piece, i in vocab.items() if not piece.startswith("<0xE")}
    return description


def test_sentencepiece_model_decodes_as_the_library_does() -> None:
    tokenizer = made("trained")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    for text in [*CORPUS, "né 🦙"]:
        assert tokenizer._processor.decode(tokenizer.encode(text)) == text
