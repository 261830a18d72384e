"""Text in, samples out: nothing lost, nothing invented, the same for the same seed, errors that name the place."""

from __future__ import annotations

import csv
import json
import time

import pytest
import torch
from conftest import tiny_tokenizer, words

from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.corpus import BLOCK_CHARS, Corpus, blocks, pad_batch, read_documents, shuffled
from sedac_cli.errors import InputError
from sedac_cli.models import load_model

DOCUMENTS = ["the sea\nwas grey", "an old king", 'said "no", and ran', "ünïcödé"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(path, documents, column="text", **extra):
    if path.suffix == ".txt":
        path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    elif path.suffix == ".jsonl":
        rows = [json.dumps({column: d, **extra}, ensure_ascii=False) for d in documents]
        path.write_text("\n\n".join(rows), encoding="utf-8")  # blank lines are allowed
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [column, *extra])
            writer.writeheader()
            writer.writerows({column: d, **extra} for d in documents)
    else:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({column: documents, **{k: [v] * len(documents) for k, v in extra.items()}})
        parquet.write_table(table, path)
    return path


def documents_of(path, **spec) -> list[str]:
    return [d.strip("\n") for d in read_documents(TextSpec(str(path), **spec))]


# Forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".TXT", ".JSONL"])
def test_every_form_gives_the_same_documents(tmp_path, suffix):
    lower = write(tmp_path / f"a{suffix.lower()}", DOCUMENTS)
    assert documents_of(lower.rename(tmp_path / f"b{suffix}")) == DOCUMENTS


def test_a_txt_without_the_mark_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(read_documents(TextSpec(str(tmp_path / "a.txt")))) == ["one\n\ntwo\n"]


def test_a_folder_mixes_forms_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.jsonl", ["1", "2"])
    write(tmp_path / "b.txt", ["3"])
    write(tmp_path / "deep" / "c.parquet", ["4"], column="body")
    write(tmp_path / "deep" / "d.csv", ["5"], column="content")
    (tmp_path / "notes.md").write_text("not read")
    assert documents_of(tmp_path) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_byte_order_mark_and_dos_line_ends_are_not_text(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["first", "second"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert documents_of(path) == ["first", "second"]


def test_dos_line_ends_inside_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n<|endoftext|>\r\nthree")
    assert list(read_documents(TextSpec(str(tmp_path / "a.txt")))) == ["one\ntwo\n", "three"]


# Columns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns(tmp_path, suffix):
    only = write(tmp_path / f"only{suffix}", ["x", "y"], column="poem")
    assert documents_of(only) == ["x", "y"]
    usual = write(tmp_path / f"usual{suffix}", ["x", "y"], title="t", author="a")
    assert documents_of(usual) == ["x", "y"]
    assert documents_of(usual, text_column="title") == ["t", "t"]
    unclear = write(tmp_path / f"unclear{suffix}", ["x"], column="poem", title="t")
    with pytest.raises(InputError, match=r"cannot tell which column holds the text \(columns: poem, title\)") as caught:
        documents_of(unclear)
    assert caught.value.hint == "--text-column NAME"
    assert documents_of(unclear, text_column="poem") == ["x"]
    with pytest.raises(InputError, match="has no column 'nix'") as caught:
        documents_of(unclear, text_column="nix")
    assert "poem, title" in caught.value.hint


def test_an_empty_first_text_does_not_move_the_choice_to_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null, "title": "t"}\n{"text": "x", "title": "t"}')
    assert documents_of(tmp_path / "a.jsonl") == ["x"]


def test_a_parquet_column_of_lists_is_not_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"tags": [["a"], ["b"]], "poem": pyarrow.array(["x", "y"]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet") == ["x", "y"]


# Mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl line 3 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl line 2: expected an object, found list"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a\.jsonl line 2 has no column 'text'"),
        ("a.txt", b"good\n\xff\xfe bad", r"a\.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not UTF-8 text"),
        ("a.csv", b"text\n\xff\n", r"a\.csv is not UTF-8 text"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a parquet file"),
        ("a.doc", b"x", r"expected one of \.txt, \.jsonl, \.parquet, \.csv, found '\.doc'"),
        ("a.txt", b"", "gave no sample of at least 2 tokens"),
        ("a.txt", b" \n\n<|endoftext|>\n \n", "gave no sample of at least 2 tokens"),
        ("a.csv", b"text\n", "gave no sample of at least 2 tokens"),
        ("a.csv", b"text,n\n ,1\n,2\n", "gave no sample of at least 2 tokens"),
        ("a.jsonl", b'{"text": 5}\n', r"cannot tell which column holds the text \(columns: text\)"),
    ],
)
def test_mistakes_are_named(tmp_path, tokenizer, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        list(Corpus(TextSpec(str(tmp_path / name)), tokenizer).samples())


def test_places_that_are_not_there(tmp_path, tokenizer):
    for dataset, said in {
        str(tmp_path): "holds no .txt",
        str(tmp_path / "nix"): "no such file or folder",
        "nix.txt": "no such file or folder: nix.txt",
        "builtin:nix": "there is no built-in text 'nix'",
    }.items():
        with pytest.raises(InputError, match=said):
            list(Corpus(TextSpec(dataset), tokenizer).samples())


def test_the_hub_without_a_network_is_one_clear_answer_at_once(tokenizer):
    began = time.monotonic()
    with pytest.raises(InputError, match="cannot read data set 'wikitext' from the hub") as caught:
        list(Corpus(TextSpec("wikitext"), tokenizer).samples())
    assert "builtin:books" in caught.value.hint
    assert "\n" not in caught.value.message
    with pytest.raises(InputError, match="cannot get the model of 'Qwen/Nix' from the hub") as caught:
        load_model(ModelSpec("Qwen/Nix"))
    assert "builtin:tiny" in caught.value.hint
    assert "--model FOLDER" in caught.value.hint
    assert "\n" not in caught.value.message
    assert time.monotonic() - began < 20


# Samples -----------------------------------------------------------------------------------------------------


def samples(path, tokenizer, **spec) -> list[list[int]]:
    return list(Corpus(TextSpec(str(path), **{"samples": 10**6, "max_length": 16, **spec}), tokenizer).samples())


def test_packing_loses_no_token(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", [words(n, n) for n in (3, 50, 1, 20)])
    got = samples(path, tokenizer, shuffle=False)
    expected = []
    for document in read_documents(TextSpec(str(path))):
        expected += ([tokenizer.eos_token_id] if expected else []) + tokenizer(document)["input_ids"]
    flat = [token for sample in got for token in sample]
    assert len(expected) % 16 != 1
    assert flat == expected
    assert all(len(sample) == 16 for sample in got[:-1])


def test_shuffled_packing_loses_no_token_either(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", [words(30, n) for n in range(9)])
    plain, mixed = (samples(path, tokenizer, shuffle=s, max_length=10**6)[0] for s in (False, True))
    assert plain != mixed
    end = tokenizer.eos_token_id

    def documents(ids):
        text = tokenizer.decode(ids)
        return sorted(part.strip() for part in text.split(tokenizer.decode([end])))

    assert documents(plain) == documents(mixed)
    assert len(documents(plain)) == 9


def test_samples_are_counted_and_limited(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", [words(200)])
    assert len(samples(path, tokenizer, samples=3)) == 3
    assert {len(s) for s in samples(path, tokenizer, samples=3)} == {16}


def test_one_document_per_sample_without_packing(tmp_path, tokenizer):
    documents = ["a", "the sea", words(5000, 1), "x", "old wind"]
    path = write(tmp_path / "a.jsonl", documents)
    got = samples(path, tokenizer, pack=False, shuffle=False)
    assert got == [tokenizer(d)["input_ids"][:16] for d in documents if len(d) > 1]
    mixed = samples(path, tokenizer, pack=False, shuffle=True)
    assert sorted(mixed) == sorted(got)  # a long document is one sample here too


def test_samples_of_one_token_only(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(InputError, match="no sample of at least 2 tokens"):
        samples(path, tokenizer, pack=False)
    assert samples(path, tokenizer, pack=True, shuffle=False) == [
        [*tokenizer("a")["input_ids"], 1, *tokenizer("b")["input_ids"]]
    ]


def test_shuffling_is_seeded_and_complete(monkeypatch):
    monkeypatch.setattr("sedac_cli.corpus.SHUFFLE_BUFFER", 16)
    items = [str(n) for n in range(500)]
    first = list(shuffled(items, 1))
    assert sorted(first) == sorted(items)
    assert first == list(shuffled(items, 1))
    assert first != list(shuffled(items, 2))
    assert first != items


@pytest.mark.parametrize(
    "document",
    [words(20_000), "x" * 50_000, "\n\n".join(words(50, n) for n in range(200)), "ab " * 9000, " " * 20_000, "", "a"],
    ids=["words", "no space", "paragraphs", "short words", "spaces", "empty", "one"],
)
def test_blocks_put_together_are_the_document(document):
    parts = list(blocks(document))
    assert "".join(parts) == document
    assert all(0 < len(part) <= BLOCK_CHARS + 2 for part in parts)


def test_cutting_at_blocks_does_not_change_the_tokens(tokenizer):
    document = words(20_000)
    ids = [token for part in blocks(document) for token in tokenizer(part)["input_ids"]]
    assert len(list(blocks(document))) > 5
    assert ids == tokenizer(document)["input_ids"]


def test_builtin_splits_are_different_books(tokenizer):
    texts = {s: next(read_documents(TextSpec("builtin:books", split=s)))[:500] for s in (None, "train", "validation")}
    assert texts[None] == texts["train"] != texts["validation"]


def test_padding():
    ids, mask = pad_batch([[5, 6, 7], [8, 9]], pad=3)
    assert torch.equal(ids, torch.tensor([[5, 6, 7], [8, 9, 3]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [1, 1, 0]]))
