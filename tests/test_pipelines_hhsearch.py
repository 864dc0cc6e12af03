"""HHsearch as a search of templates: its hits are those of the program run by hand."""

import dataclasses
import datetime
import gzip
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from pipelines_data import needs_hhsuite, stand_in

from foldfeed.feature_store.parsers.a3m import a3m_rows
from foldfeed.pipelines.databases.files import make_manifest
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.databases.template_database import count_dated
from foldfeed.pipelines.errors import ToolOutputError
from foldfeed.pipelines.tools.hhsearch import Hhsearch
from foldfeed.pipelines.tools.search_tool import find_binary
from foldfeed.pipelines.tools.template_tool import read_template_hits

pytestmark = [pytest.mark.external_tool, needs_hhsuite]

# A line of the table at the top: name, probability, E-value, columns, ranges of both, size of the template.
LINE = re.compile(
    r"^ *\d+ (\S+).{20,30} ([\d.]+) +(\S+) +\S+ +\S+ +\S+ +(\d+) +(\d+)-(\d+) +(\d+)-(\d+) +\((\d+)\)$",
    re.MULTILINE,
)
CUT = """
"$REAL" "$@"
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
head -c 3000 $out > $out.x; mv $out.x $out
"""


def test_hits_of_hhsearch_are_those_of_its_own_result(tmp_path, real_file):
    """A database of 155 profiles, the query's own among them; faults of the program give no answer."""
    with tarfile.open(real_file("hhdb/hhdb.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    prefix = tmp_path / "hhdb" / "db"
    names = [line.split("\t")[0] for line in Path(f"{prefix}_a3m.ffindex").read_text().splitlines()]
    dated = {name: 1990 + at % 30 for at, name in enumerate(names) if at % 2}
    dates = tmp_path / "dates.tsv"
    dates.write_text("".join(f"{name}\t{year}-01-02\t\n" for name, year in dated.items()))
    text = gzip.decompress(real_file("msas/1a3a_1_A/hhblits_uniclust.a3m.gz").read_bytes())
    rows = [row for _, row, _ in a3m_rows(text)][:40]
    sequence = rows[0].decode()
    spec = DatabaseSpec.parse_templates(f"p70={prefix},{dates}")
    assert (spec.tool, len(spec.files())) == ("hhsearch", 7)
    assert (make_manifest(spec).num_sequences, count_dated(spec)) == (155, (77, 155))
    tool = Hhsearch.find(database=str(prefix), dates=str(dates), cpus=1, timeout_s=60.0)
    result = tool.search(sequence, rows)
    hits, num_rows = read_template_hits(result, sequence)
    table = LINE.findall(run_by_hand(tmp_path, rows, prefix))
    assert len(hits) == num_rows == len(table) >= 10
    for hit, (name, probability, e_value, count, *ranges, size) in zip(hits, table, strict=True):
        assert (hit.template_id, hit.num_aligned, len(hit.sequence)) == (name, int(count), int(size))
        assert (hit.query_span[0] + 1, hit.query_span[1]) == tuple(map(int, ranges[:2]))
        assert (hit.template_span[0] + 1, hit.template_span[1]) == tuple(map(int, ranges[2:]))
        assert hit.probability == pytest.approx(float(probability), abs=0.051)
        assert hit.e_value == pytest.approx(float(e_value), rel=0.06)
        assert hit.release_date == (datetime.date(dated[name], 1, 2) if name in dated else None)
    assert (hits[0].template_id, hits[0].sequence) == ("1a3a_1_A", sequence)
    # Equal answers are equal bytes, wherever and whenever they were made.
    assert b"/tmp" not in result.alignment + result.table
    assert tool.search(sequence, rows).alignment == result.alignment
    faults = (("exit 0\n", "expected 'Query'|table has 0"), (f"REAL={find_binary('hhsearch')}{CUT}", "cut"))
    for number, (script, words) in enumerate(faults):
        path = stand_in(tmp_path / f"bin{number}", script, "hhsearch") / "hhsearch"
        with pytest.raises(ToolOutputError, match=words):
            dataclasses.replace(tool, binary=str(path)).search(sequence, rows)


def run_by_hand(folder: Path, rows: list[bytes], prefix: Path) -> str:
    result = folder / "x.hhr"
    (folder / "x.a3m").write_bytes(b"".join(b">%d\n%s\n" % pair for pair in enumerate(rows)))
    words = [find_binary("hhsearch"), "-i", str(folder / "x.a3m"), "-o", str(result), "-maxseq", "1000000"]
    subprocess.run([*words, "-cpu", "1", "-d", str(prefix)], check=True, capture_output=True)
    return result.read_text()
