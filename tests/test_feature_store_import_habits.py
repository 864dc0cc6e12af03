"""What other people's files do that no format asks for: marks, packing twice, one name for all, escapes."""

import bz2
import gzip
import lzma

import pytest
import zstandard
from click.testing import CliRunner

from foldfeed.feature_store import AlignmentImport, AlignmentParseError, FeatureStore, ImportOptions
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.cli.terminal import printable
from foldfeed.feature_store.exchange_errors import SourceFileError
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.feature_store.parsers.bounded_files import read_file
from foldfeed.feature_store.parsers.stockholm import parse_stockholm

A3M = b">q\nACDE\n>h\nA-kDE\n"
STO = b"# STOCKHOLM 1.0\nq ACDE\nh A-DE\n//\n"
MARK = b"\xef\xbb\xbf"
PACK = {"gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress}
PACK["zstd"] = zstandard.ZstdCompressor().compress


def ingest(root, layout, store, **options):
    runner = CliRunner()
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments = ["ingest", "--alignments", str(root), "--store", str(store), *words]
    return runner.invoke(main, [*arguments, *(["--layout", layout] if layout else [])])


@pytest.mark.parametrize(
    ("name", "text", "layout"),
    [
        ("q.a3m", A3M, "a3m"),
        ("q.a3m", b"#4\t1\n" + A3M, "colabfold"),
        ("q.a2m", b">q\nACDE\n>h\nA-DE\n", "a2m"),
        ("q.sto", STO, "sto"),
        ("q.a3m.gz", A3M, None),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, text, layout):
    for folder, data in (("with", MARK + text), ("without", text)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        done = ingest(tmp_path / folder, layout, tmp_path / f"{folder}-store")
        assert done.exit_code == 0, done.output
    marked, plain = (FeatureStore.open(tmp_path / f"{name}-store") for name in ("with", "without"))
    assert list(marked) == list(plain) == ["q"]
    assert (marked["q"].msa() == plain["q"].msa()).all()
    assert (marked["q"].deletions() == plain["q"].deletions()).all()


def test_the_header_behind_a_mark_can_be_the_id(tmp_path):
    (tmp_path / "x.a3m").write_bytes(MARK + A3M.replace(b">q", b">first"))
    assert ingest(tmp_path / "x.a3m", "a3m", tmp_path / "s", id_from="header").exit_code == 0
    assert list(FeatureStore.open(tmp_path / "s")) == ["first"]


@pytest.mark.parametrize("outer", PACK)
@pytest.mark.parametrize("inner", PACK)
def test_what_was_compressed_twice_says_so_in_plain_text(tmp_path, inner, outer):
    path = tmp_path / "q.a3m.gz"
    path.write_bytes(PACK[outer](PACK[inner](A3M)))
    with pytest.raises(SourceFileError, match=f"looks like {inner} data inside {outer}") as caught:
        read_file(path)
    assert str(caught.value).isprintable()
    done = ingest(path, "a3m", tmp_path / "s")
    assert done.exit_code == 1
    assert "compressed twice" in done.output
    assert done.output.replace("\n", "").isprintable()


def test_bytes_before_the_first_header_are_shown_as_escapes():
    with pytest.raises(AlignmentParseError, match="text before the first") as caught:
        parse_a3m(b"\xff\xfe\x00\x1b[31m junk\n>q\nACDE\n")
    assert str(caught.value).isprintable()
    assert "\ufffd" not in str(caught.value)


def test_two_alignments_in_one_stockholm_file_are_never_one(tmp_path):
    with pytest.raises(AlignmentParseError, match=r"line 5: a second alignment begins here.*split the file"):
        parse_stockholm(STO + STO)
    assert parse_stockholm(STO + b"\n \n").names == ["q", "h"]
    (tmp_path / "x.sto").write_bytes(STO + b"\n" + STO)
    done = ingest(tmp_path, "sto", tmp_path / "s")
    assert done.exit_code == 1
    assert "a second alignment begins here" in done.output


@pytest.mark.parametrize("layout", ["a3m", "sto"])
def test_one_file_name_in_every_folder_gives_the_folders_names(tmp_path, layout):
    text = A3M if layout == "a3m" else STO
    for name in ("p1", "p2", "p3"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"out.{layout}").write_bytes(text)
    assert ingest(tmp_path / "in", layout, tmp_path / "s").exit_code == 0
    assert list(FeatureStore.open(tmp_path / "s")) == ["p1", "p2", "p3"]
    # One that is called otherwise: the names of files say something again, and two of them clash.
    (tmp_path / "in" / "p1" / f"out.{layout}").rename(tmp_path / "in" / "p1" / f"other.{layout}")
    found = AlignmentImport(tmp_path / "in", layout, ImportOptions())
    assert sorted({source.record_id for source in found.sources}) == ["other", "out"]


HOSTILE = "q \x1b[31mred\x1b]0;title\x07 \u202egnp.exe \x9b2J"


def test_escapes_are_stored_as_they_are_and_printed_escaped(tmp_path):
    text = f">{HOSTILE}\nACDE\n>hit\x1b[2J\x07x y\nA-DE\n"
    (tmp_path / "q.a3m").write_text(text, encoding="utf-8")
    store = tmp_path / "s"
    assert ingest(tmp_path / "q.a3m", "a3m", store).exit_code == 0
    record = FeatureStore.open(store)["q"]
    assert record.description == HOSTILE.removeprefix("q ")
    assert "\x1b" in record.rows()["hit_id"].to_pylist()[1]
    for words in (
        ["show", str(store), "q"],
        ["crop", str(store), "q"],
        ["query", str(store), "select description from records"],
        ["query", str(store), "select hit_id from rows"],
        ["show", str(store), "no\x1b[31msuch"],
    ):
        output = CliRunner().invoke(main, words).output
        assert output
        assert [char for char in output if not (char.isprintable() or char == "\n")] == []
        assert "\\x1b" in output


def test_printable_leaves_ordinary_text_alone():
    for text in ("Hämoglobin β-chain (猫)", "tab\tand\nnewline", "plain"):
        assert printable(text) == text
