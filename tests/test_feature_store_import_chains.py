"""Alignments of several chains become records of one chain each; their pairs can be put together again."""

import csv
import gzip
import itertools
import json
import pickle

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from import_reference import naive_rows, read_all

from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.exchange_errors import LayoutError
from foldfeed.feature_store.format import alphabet

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
letters = st.sampled_from("ACDEFGHIKLMNPQRSTVWY")


@st.composite
def chains(draw):
    """Queries of two to four chains, their own hits, and pairs: of each a row of every chain, or gaps."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))

    def row(length: int) -> str:
        columns = draw(st.lists(st.sampled_from("ACDY-"), min_size=length, max_size=length))
        # At least one residue: rows of gaps only fill up.
        columns[draw(st.integers(0, length - 1))] = "W"
        inserted = [draw(st.sampled_from(["", "", "k", "gh"])) for _ in columns]
        return "".join(itertools.chain(*zip(inserted, columns, strict=True)))

    queries = ["".join(draw(st.lists(letters, min_size=size, max_size=size))) for size in lengths]
    own = [[row(size) for _ in range(draw(st.integers(0, 3)))] for size in lengths]
    pairs = []
    for _ in range(draw(st.integers(0, 4))):
        present = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
        if sum(present) > 1:
            pairs.append(
                [row(size) if there else "-" * size for size, there in zip(lengths, present, strict=True)]
            )
    return queries, own, pairs


def is_there(row: str) -> bool:
    return row.strip("-") != ""


def naive(row: str) -> tuple[list[int], list[int]]:
    ((_, columns, counts),) = naive_rows(f">x\n{row}\n")
    return alphabet.encode(columns).tolist(), counts


def assert_chains(records, queries, own, pairs) -> None:
    """Every chain has its rows in order, and equal keys of chains are exactly the pairs."""
    assert [record.sequence for record in records] == queries
    for number, record in enumerate(records):
        want = [pair[number] for pair in pairs if is_there(pair[number])] + own[number]
        got = list(zip(record.msa[1:].tolist(), record.deletions[1:].tolist(), strict=True))
        assert got == [naive(row) for row in want]
    found: dict[str, list] = {}
    for number, record in enumerate(records):
        for row, key in enumerate(record.rows.pairing_key or [""] * record.depth):
            if key:
                found.setdefault(key, [None] * len(records))[number] = record.msa[row].tolist()
    rebuilt = sorted(found.values(), key=repr)
    assert rebuilt == sorted(
        ([naive(row)[0] if is_there(row) else None for row in pair] for pair in pairs), key=repr
    )


def merged_text(queries, own, pairs) -> str:
    """As ColabFold writes it: all chains of a pair in one row, then each chain's own rows between gaps."""
    ids = [str(101 + number) for number in range(len(queries))]
    lines = [f"#{','.join(str(len(one)) for one in queries)}\t{','.join('1' for _ in queries)}"]
    lines += [">" + "\t".join(ids), "".join(queries)]
    for place, pair in enumerate(pairs):
        lines += [">" + "\t".join(f"pair{place}_{chain}" for chain in ids), "".join(pair)]
    for number, (query, rows) in enumerate(zip(queries, own, strict=True)):
        before, after = (
            "".join("-" * len(one) for one in part) for part in (queries[:number], queries[number + 1 :])
        )
        for place, row in enumerate([query, *rows]):
            lines += [f">{ids[number]}" if not place else f">own{place}\t90\t0.5", before + row + after]
    return "\n".join(lines) + "\n"


@QUICK
@given(chains())
def test_a_merged_a3m_is_taken_apart(tmp_path_factory, drawn):
    queries, own, pairs = drawn
    own = [[row for row in rows if row != query] for rows, query in zip(own, queries, strict=True)]
    folder = tmp_path_factory.mktemp("merged")
    (folder / "complex.a3m").write_text(merged_text(queries, own, pairs))
    found, records = read_all(folder)
    assert found.rejects == []
    assert [record.record_id for record in records] == [f"complex_{101 + n}" for n in range(len(queries))]
    assert {record.extra["assembly"] for record in records} == {"complex"}
    assert_chains(records, queries, own, pairs)
    for number, record in enumerate(records):
        names = [name for name, key in zip(record.rows.hit_id, record.rows.pairing_key, strict=True) if key]
        assert names == [
            f"pair{place}_{101 + number}" for place, pair in enumerate(pairs) if is_there(pair[number])
        ]


def test_a_merged_a3m_whose_rows_do_not_fit_is_refused_with_its_line(tmp_path):
    text = merged_text(["ACD", "EFGH"], [["A-D"], []], [["ACD", "E-GH"]])
    (tmp_path / "x.a3m").write_text(text.replace("ACDE-GH", "ACDE-G"))
    found, records = read_all(tmp_path)
    assert records == []
    assert ["line 4: the row has 6 columns" in one.reason for one in found.rejects] == [True, True]
    (tmp_path / "x.a3m").write_text(text.replace("#3,4\t1,1", "#3,4\t1"))
    assert "as many lengths as copies" in read_all(tmp_path, "colabfold")[0].rejects[0].reason
    (tmp_path / "x.a3m").write_text(text.replace(">101\t102\nACDEFGH", ">101\t102\nACD----"))
    assert "must have residues in every chain" in read_all(tmp_path)[0].rejects[0].reason


def server_files(folder, queries, own, pairs, packed=False) -> None:
    """As an MSA server sends them; own rows alternate between its two databases."""
    folder.mkdir(exist_ok=True)
    ids = [str(101 + number) for number in range(len(queries))]
    texts = {"uniref.a3m": [], "bfd.mgnify30.metaeuk30.smag30.a3m": [], "pair.a3m": []}
    for number, (query, rows) in enumerate(zip(queries, own, strict=True)):
        for name, mine in (("uniref.a3m", rows[:1]), ("bfd.mgnify30.metaeuk30.smag30.a3m", rows[1:])):
            texts[name].append(
                "".join(
                    f">{name}\n{row}\n"
                    for name, row in [(ids[number], query), *zip("abc", mine, strict=False)]
                )
            )
        texts["pair.a3m"].append(
            f">{ids[number]}\n{query}\n"
            + "".join(f">p{place}\n{pair[number]}\n" for place, pair in enumerate(pairs))
        )
    for name, sections in texts.items():
        data = "".join(section + "\0" for section in sections).encode()
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)


@QUICK
@given(chains(), st.booleans())
def test_files_of_an_msa_server(tmp_path_factory, drawn, packed):
    queries, own, pairs = drawn
    folder = tmp_path_factory.mktemp("server") / "job"
    server_files(folder, queries, own, pairs, packed)
    found, records = read_all(folder, paired=True)
    assert found.layout == "msa-server"
    assert [record.record_id for record in records] == [f"job_{101 + n}" for n in range(len(queries))]
    assert_chains(records, queries, own, pairs)
    found, records = read_all(folder)
    assert found.left_out == {"pair": len(queries)}
    assert_chains(records, queries, own, [])
    for record, rows in zip(records, own, strict=True):
        names = [use.name for use in record.databases]
        assert names == ["uniref", "bfd.mgnify30.metaeuk30.smag30"]
        assert record.rows.database.tolist() == [-1, *([0] if rows else []), *([1] * len(rows[1:]))]


def test_one_chain_of_a_server_is_one_record_named_by_its_folder(tmp_path):
    server_files(tmp_path / "job_env", ["ACDE"], [["A-DE", "ACD-"]], [])
    (tmp_path / "job_env" / "pair.a3m").unlink()
    found, (record,) = read_all(tmp_path)
    assert (record.record_id, record.depth, found.rejects) == ("job_env", 3, [])
    assert read_all(tmp_path, "msa-server", databases=("uniref",))[1][0].depth == 2
    (rejected,) = read_all(tmp_path, "msa-server", databases=("mgnify",))[0].rejects
    assert "it has no 'mgnify', only bfd" in rejected.reason


def test_sections_that_cannot_be_told_apart_are_refused(tmp_path):
    (tmp_path / "uniref.a3m").write_bytes(b">101\nACDE\n\0>101\nACDE\n\0")
    assert "section '101' is there twice" in read_all(tmp_path)[0].rejects[0].reason
    (tmp_path / "uniref.a3m").write_bytes(b">101\nACDE\n\0>102\nACDE\n>h\nACD\n\0")
    found, records = read_all(tmp_path)
    assert [record.sequence for record in records] == ["ACDE"]
    assert "section '102'" in found.rejects[0].reason
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "q.a3m").write_bytes(b">101\nACDE\n\0>102\nACD\n\0")
    assert "import their folder as layout msa-server" in read_all(plain)[0].rejects[0].reason


@QUICK
@given(chains(), st.sampled_from(["-1", "", "nan", "-1.0"]), st.booleans(), st.booleans())
def test_boltz_csv(tmp_path_factory, drawn, unpaired, is_float, is_swapped):
    queries, own, pairs = drawn
    folder = tmp_path_factory.mktemp("boltz")
    for number, query in enumerate(queries):
        with (folder / f"target_{number}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            table = [("key", "sequence"), (unpaired, query)]
            for place, pair in enumerate(pairs):
                if is_there(pair[number]):
                    table.append((f"{place}.0" if is_float else place, pair[number]))
            table += [(unpaired, row) for row in own[number]]
            writer.writerows(row[::-1] if is_swapped else row for row in table)
    found, records = read_all(folder)
    assert (found.layout, found.rejects) == ("boltz-csv", [])
    assert [record.record_id for record in records] == [f"target_{n}" for n in range(len(queries))]
    assert {record.extra["assembly"] for record in records} == {"target"}
    assert_chains(records, queries, own, pairs)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("key,sequence\n-1,ACDE\nx,ACDE\n", "line 3: key 'x' is no whole number"),
        ("key,sequence\n-1,ACDE\n1,ACD\n", "line 3: the row has 3 columns"),
        ("key,sequence\n-1,ACDE,9\n", "line 2: it has 3 cells"),
        ("key,sequence\n", "no row"),
        ("id,sequence\n1,ACDE\n", "must be key and sequence, not id, sequence"),
    ],
)
def test_boltz_csv_that_cannot_be_used(tmp_path, text, reason):
    path = tmp_path / "x.csv"
    path.write_text(text)
    found, records = read_all(path, "boltz-csv")
    assert records == []
    assert reason in found.rejects[0].reason


@QUICK
@given(chains())
def test_protenix(tmp_path_factory, drawn):
    queries, own, pairs = drawn
    folder = tmp_path_factory.mktemp("protenix")
    for number, query in enumerate(queries):
        chain = folder / "job" / str(number + 1)
        chain.mkdir(parents=True)
        paired = [(f"UniRef100_P{number}_{9000 + place}/", pair[number]) for place, pair in enumerate(pairs)]
        for name, rows in (
            ("pairing", [row for row in paired if is_there(row[1])]),
            ("non_pairing", [(f"own{place}", row) for place, row in enumerate(own[number])]),
        ):
            text = "".join(f">{header}\n{row}\n" for header, row in [("query", query), *rows])
            (chain / f"{name}.a3m").write_text(text)
    found, records = read_all(folder)
    assert (found.layout, [record.record_id for record in records]) == (
        "protenix",
        [str(number + 1) for number in range(len(queries))],
    )
    assert {record.extra["assembly"] for record in records} == {"job"}
    # Rows of the second file that repeat letters of an earlier row go; pairs stay all.
    kept = []
    for number, query in enumerate(queries):
        seen = {
            query,
            *(naive_rows(f">x\n{pair[number]}\n")[0][1] for pair in pairs if is_there(pair[number])),
        }
        kept.append([])
        for row in own[number]:
            columns = naive_rows(f">x\n{row}\n")[0][1]
            if columns not in seen:
                kept[-1].append(row)
            seen.add(columns)
    assert_chains(records, queries, kept, pairs)


def test_chains_of_several_jobs_are_called_by_job_and_chain(tmp_path):
    for job, chain in itertools.product("ab", "12"):
        (tmp_path / job / chain).mkdir(parents=True)
        (tmp_path / job / chain / "non_pairing.a3m").write_text(">query\nACDE\n")
    assert [record.record_id for record in read_all(tmp_path)[1]] == ["a_1", "a_2", "b_1", "b_2"]


def test_the_published_root_of_openproteinset(tmp_path):
    for chain in ("pdb/1abc_A", "pdb/1xyz_B", "uniclust30/U1"):
        (tmp_path / chain / "a3m").mkdir(parents=True)
        for name in ("uniref90_hits.a3m", "mgnify_hits.a3m"):
            (tmp_path / chain / "a3m" / name).write_text(f">q\nACDE\n>{name}\nA-DE\n")
    for path in (tmp_path, tmp_path / "pdb", tmp_path / "pdb" / "1abc_A"):
        found, _ = read_all(path)
        assert (found.layout, found.rejects) == ("openproteinset", [])
    assert [record.record_id for record in read_all(tmp_path)[1]] == ["1abc_A", "1xyz_B", "U1"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/non.a3m", "a/uniref30.a3m"], "called after databases, such as 'uniref30'"),
        (["1/a.a3m", "2/a.a3m", "3/a.a3m", "4/a.a3m", "5/b.a3m"], "3 of 5 would have the id of another"),
    ],
)
def test_a_bad_guess_is_no_guess(tmp_path, names, words):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(">q\nACDE\n")
    with pytest.raises(LayoutError, match=words) as caught:
        read_all(tmp_path)
    assert caught.value.looked_for
    done = CliRunner().invoke(main, ["ingest", "--alignments", str(tmp_path), "--store", str(tmp_path / "s")])
    assert done.exit_code == 1
    assert "Say with --layout" in done.output
    # Whoever says what it is gets it.
    assert read_all(tmp_path, "a3m")[1]
    assert read_all(tmp_path, "a3m", id_from="folder")[1]


def test_names_that_are_no_ids_are_told(tmp_path):
    (tmp_path / "job 1.a3m").write_text(">q\nACDE\n")
    (tmp_path / "sp%7CP1.a3m").write_text(">q\nACDE\n")
    found, records = read_all(tmp_path)
    assert [record.record_id for record in records] == ["job_1", "sp|P1"]
    assert found.renamed == {"job 1": "job_1"}
    done = CliRunner().invoke(main, ["ingest", "--alignments", str(tmp_path), "--store", str(tmp_path / "s")])
    assert "1 names cannot be record ids and were changed, such as 'job 1' to 'job_1'" in done.output


def unifold(**changes):
    dense = np.zeros((3, 4), np.int32)
    dense[1, 2], dense[2, 0] = 7, 300
    row, col = np.nonzero(dense)
    features = {
        "sequence": np.array([b"ACDE"], dtype=object),
        "msa": np.array([[0, 1, 2, 3], [0, 1, 21, 3], [20, 1, 2, 3]], np.uint8),
        "sparse_deletion_matrix_int": {
            "shape": (3, 4),
            "row": row.astype(np.int32),
            "col": col.astype(np.int32),
            "data": dense[row, col],
        },
    }
    features["sparse_deletion_matrix_int"] |= changes
    return features, dense


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_sparse_deletions_of_unifold(tmp_path, protocol):
    features, dense = unifold()
    (tmp_path / "1abc_A.feature.pkl.gz").write_bytes(gzip.compress(pickle.dumps(features, protocol)))
    found, (record,) = read_all(tmp_path)
    assert (found.layout, record.record_id, record.sequence) == ("alphafold2", "1abc_A", "ACDE")
    np.testing.assert_array_equal(record.deletions, dense)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": (3, 5)}, "'shape' is that of msa"),
        ({"row": np.array([1, 3])}, "0 to 2 are possible"),
        ({"col": np.array([1])}, "must have one length"),
        ({"data": np.array([1.5, 2.0])}, "must be there, with integers"),
        ({"data": np.array([-1, 2])}, "0 to 2147483647 are possible"),
    ],
)
def test_sparse_deletions_that_cannot_be(tmp_path, changes, reason):
    features, _ = unifold(**changes)
    path = tmp_path / "x.feature.pkl"
    path.write_bytes(pickle.dumps(features))
    found, records = read_all(path)
    assert records == []
    assert reason in found.rejects[0].reason
    json.dumps(found.rejects[0].reason)
