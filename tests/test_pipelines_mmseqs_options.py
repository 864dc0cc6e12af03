"""What a person may choose of an MMseqs2 search, and how queries are divided among its runs."""

import pytest

from foldfeed.pipelines import DatabaseSpec
from foldfeed.pipelines.errors import ConfigError
from foldfeed.pipelines.searches import together
from foldfeed.pipelines.tools.mmseqs_commands import MmseqsOptions, commands_of


def test_as_few_runs_as_workers_allow():
    assert [together.num_groups_of(number, 1) for number in (0, 1, 64, 65, 1000)] == [1, 1, 1, 2, 16]
    assert [together.num_groups_of(number, 32) for number in (0, 31, 80, 1000, 10_000)] == [1, 1, 2, 31, 157]


def test_options_are_read_and_refused_in_words():
    options = DatabaseSpec.parse("e=/x:mmseqs2,after=u,filter=0,s=5.7,db-load-mode=2").options
    assert options == MmseqsOptions(after="u", filter=False, sensitivity=5.7, db_load_mode=2)
    for text, said in (
        ("e=/x:mmseqs2,after", "option 'after' of mmseqs2 is unknown"),
        ("e=/x:mmseqs2,s=8,s=7", "'s=7' of mmseqs2 is given twice"),
        ("e=/x:mmseqs2,filter=2", "must be filter=0 or filter=1"),
        ("e=/x:mmseqs2,s=9", "s=9 must be 1 to 8"),
        ("e=/x:mmseqs2,s=nan", "s=nan must be 1 to 8"),
        ("e=/x:mmseqs2,s=fast", "could not convert"),
        ("e=/x:mmseqs2,db-load-mode=4", "must be 0, 1, 2 or 3"),
        ("e=/x:mmseqs2,after=e", "cannot be searched after itself"),
    ):
        with pytest.raises(ConfigError, match=said):
            DatabaseSpec.parse(text)
    with pytest.raises(ConfigError, match="jackhmmer has no options"):
        DatabaseSpec(name="a", paths=("/x",), tool="jackhmmer", options=MmseqsOptions(filter=False))


def test_a_choice_that_changes_rows_changes_the_commands_and_no_other():
    def words(**options) -> str:
        kind = options.pop("kind", "clusters")
        return " ".join(word for command in commands_of(kind, MmseqsOptions(**options)) for word in command)

    whole = words()
    assert words(db_load_mode=3) == whole
    every = words(filter=False)
    for before, after in (
        ("--expand-filter-clusters 1", "--expand-filter-clusters 0"),
        ("--max-accept 100000 ", "--max-accept 1000000 "),
        ("--qsc 0.8", "--qsc -20.0"),
        ("--filter-msa 1", "--filter-msa 0"),
    ):
        assert whole.count(before) == every.count(after) == 1
    assert words(sensitivity=5.7) == whole.replace("-s 8.0", "-s 5.7")
    after = words(kind="clusters after")
    assert "search profile {database}" in after
    assert "--expand-filter-clusters" not in after
