"""Files of texts: tables, other encodings, compressed ones, and what no tokenizer reads."""

import bz2
import gzip
import json
import lzma
import sys
import zipfile

import pandas as pd
import pytest

import mechsvd as ms
from mechsvd.engine.stream import stream_writes
from mechsvd.model.texts import read_texts

ROWS = [("I believe, it\nis", ' "so"'), ("We think", " so"), ("The end", None)]
FRAME = pd.DataFrame(ROWS, columns=["prompt", "continuation"])


def read(source, bad=None):
    return [(text.prompt, text.continuation) for text in read_texts(source, bad)]


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    "name", ["p.csv", "p.TSV", "p.json", "p.jsonl", "columns.json", "split.json"]
)
def test_tables_in_files_are_read_by_their_columns(tmp_path, name):
    path = tmp_path / name
    if path.suffix.lower() in (".csv", ".tsv"):
        frame = FRAME.assign(id=[1, 2, 3])
        frame.to_csv(path, index=False, sep="," if name == "p.csv" else "\t", encoding="utf-8-sig")
    else:
        orient = {"p": "records", "columns": "columns", "split": "split"}[path.stem]
        FRAME.to_json(path, orient=orient, lines=path.suffix == ".jsonl")
    assert read(path) == ROWS


@pytest.mark.fault(56)
def test_json_of_columns_is_a_table(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(FRAME[:2].to_dict("list")), encoding="utf-8")
    assert read(tmp_path / "p.json") == ROWS[:2]


@pytest.mark.fault(56)
def test_parquet_files_are_read_or_name_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    FRAME.to_parquet(tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == ROWS
    FRAME.rename(columns={"prompt": "q"}).to_parquet(tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"q.parquet.*columns \['q'.*`prompt` or `text`"):
        read(tmp_path / "q.parquet")
    (tmp_path / "r.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"r.parquet cannot be read as Parquet"):
        read(tmp_path / "r.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="needs pyarrow: pip install pyarrow"):
        read(tmp_path / "p.parquet")


@pytest.mark.fault(56)
def test_a_table_without_texts_or_with_ragged_rows_is_refused_with_its_line(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("question,answer\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"p.csv \(line 1\).*\['question', 'answer'\]"):
        read(path)
    path.write_text("prompt;continuation\na;b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"columns \['prompt;continuation'\]"):
        read(path)
    path.write_text("prompt,continuation\na,b\nc, d, e\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"text 1 \(line 3 of p.csv\) has 3 cells, but the header 2"
    ):
        read(path)


@pytest.mark.fault(56)
def test_a_table_is_a_corpus_and_a_cell_may_be_long(embedded, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("text,id\n" + "We think so. " * 20000 + ",1\n,2\n", encoding="utf-8")
    (long, _) = read(path, [])[0]
    assert len(long) == 13 * 20000
    path.write_text('text,id\n"We think, so.",1\n,2\n', encoding="utf-8")
    stream = stream_writes(embedded, path, layers=[0])
    assert (stream.documents, stream.places[0].empty) == (2, 1)
    assert stream.tokens == len(ms.Task.from_text(embedded, "We think, so.", " It").tokens) - 1


BAD = {
    "latin-1": ("é is é".encode("latin1"), "is not UTF-8: byte 0xe9 at character 0"),
    "cp1252": ("the “end”".encode("cp1252"), "is not UTF-8: byte 0x93 at character 4"),
    "cut off": ("→".encode()[:2], "is not UTF-8"),
    "a surrogate in bytes": (b"\xed\xa0\x80", "is not UTF-8"),
    "NUL": (b"a\0b", "holds NUL bytes"),
    "UTF-16 without a mark": ("abc".encode("utf-16-le"), "holds NUL bytes"),
}


@pytest.mark.fault(57)
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv"])
def test_a_line_that_is_no_text_is_named_or_skipped(embedded, tmp_path, suffix, case):
    content, message = BAD[case]
    path = tmp_path / f"p{suffix}"
    good = b'{"prompt": "We think"}' if suffix == ".jsonl" else b"We think"
    head = b"prompt\n" if suffix in (".csv", ".tsv") else b""
    path.write_bytes(
        head
        + good
        + b"\n"
        + content
        + b"\n"
        + good
        + b" so\n"[: 4 if head or suffix == ".txt" else 0]
    )
    place = rf"text 1 \(line {3 if head else 2} of p{suffix}\) {message}"
    for call in (ms.tasks_from, stream_writes):
        with pytest.raises(ValueError, match=place):
            call(embedded, path)
    with pytest.warns(UserWarning, match=f"left out: {place}"):
        tasks = ms.tasks_from(embedded, path, max_new_tokens=2, on_bad="skip")
    assert len(tasks) == 2


@pytest.mark.fault(57)
def test_a_bad_line_of_json_is_skipped_too(embedded, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "We think"}\n{"prompt": \n"I believe"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"text 1 \(line 2 of p.jsonl\) is not JSON"):
        ms.tasks_from(embedded, path)
    with pytest.warns(UserWarning, match="1 texts are left out: text 1 .line 2"):
        assert len(ms.tasks_from(embedded, path, max_new_tokens=2, on_bad="skip")) == 2


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("p.txt", content)


WHOLE = {
    "gzip": lambda path, text: path.write_bytes(gzip.compress(text)),
    "bzip2": lambda path, text: path.write_bytes(bz2.compress(text)),
    "xz": lambda path, text: path.write_bytes(lzma.compress(text)),
    "zip": write_zip,
    "zstd": lambda path, text: path.write_bytes(b"\x28\xb5\x2f\xfd" + text),
    "UTF-16": lambda path, text: path.write_bytes(text.decode().encode("utf-16")),
    "UTF-32": lambda path, text: path.write_bytes(text.decode().encode("utf-32")),
    "Parquet": lambda path, text: path.write_bytes(b"PAR1" + text),
}


@pytest.mark.fault(57)
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_a_file_that_is_no_text_is_refused_as_what_it_is(embedded, tmp_path, kind, suffix):
    path = tmp_path / f"p{suffix}"
    WHOLE[kind](path, b"prompt\nWe think so\n")
    for call in (ms.tasks_from, stream_writes):
        with pytest.raises(ValueError, match=rf"p{suffix} \(line 1\) is .*{kind}"):
            call(embedded, path)


@pytest.mark.fault(57)
def test_what_the_tokenizer_refuses_is_an_error_with_its_place_or_skipped(embedded, monkeypatch):
    texts = ["We think", "half \ud83d of it", {"prompt": "We", "continuation": "\udce9"}]
    for source, number in ((texts, 1), ([texts[0], texts[2]], 1)):
        with pytest.raises(ValueError, match=f"text {number}: .* holds half of a character"):
            ms.tasks_from(embedded, source)
        with pytest.raises(ValueError, match=f"text {number}: .* holds half of a character"):
            stream_writes(embedded, source)
    with pytest.warns(UserWarning, match="2 texts are left out: text 1: .*; text 2: "):
        assert len(ms.tasks_from(embedded, texts, max_new_tokens=2, on_bad="skip")) == 1

    def refuse(text, **options):
        raise OverflowError("too long for me")

    monkeypatch.setattr(embedded.tokenizer, "encode", refuse)
    with pytest.raises(ValueError, match="text 0: The tokenizer cannot read 'We'.*too long for me"):
        ms.tasks_from(embedded, ["We"])


@pytest.mark.fault(57)
def test_a_document_of_json_names_the_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes('["We",\n"é"]'.encode("latin1"))
    with pytest.raises(ValueError, match=r"p.json \(line 2\) is not UTF-8: byte 0xe9"):
        read(path)
