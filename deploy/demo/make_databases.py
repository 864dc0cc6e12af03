"""Makes the demo's databases and queries from the real proteins in HMMER's tutorial.

    python deploy/demo/make_databases.py OUT_DIR [--examples DIR]

    OUT_DIR/uniref90.fasta      real sequences (whole proteins and Pfam seed domains) among shuffled decoys
    OUT_DIR/mgnify.fasta        fragments of real sequences, as metagenomes have them, among other decoys
    OUT_DIR/hhsuite/db_*        an HH-suite database of real alignments, made with the suite's own tools
    OUT_DIR/queries.fasta       thirteen real queries and one record that is bad on purpose

Every residue comes from a real protein; decoys are the same residues in another order, so they have a
protein's composition and no relatives. Everything is a function of the tutorial's files, this script and the
tools, so a second run finds the digests unchanged and does nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from foldfeed.pipelines.tools.search_tool import find_binary

DEFAULT_EXAMPLES = "/usr/share/doc/hmmer/examples"
NUM_DECOYS = {"uniref90.fasta": 3000, "mgnify.fasta": 1000}
# Pfam seed alignments among HMMER's examples: real proteins, aligned by hand.
FAMILIES = ("globins4", "fn3", "Pkinase", "RRM_1", "SMC_N", "Patched", "LuxC", "Caudal_act")
# Whole alignments made by searching, as a real HH-suite database holds them.
SEARCHED_ENTRIES = ("HBB_HUMAN", "MYG_PHYCA")
QUERIES = (
    *("HBB_HUMAN", "HBA_HUMAN", "MYG_PHYCA", "GLB5_PETMA"),
    *("AKT1_HUMAN/150-408", "KIN28_YEAST/7-290", "MK04_HUMAN/20-312"),
    *("LAR_DROME/418-503", "ITB4_HUMAN/1128-1208", "EPHA2_HUMAN/437-519"),
    *("GBP2_YEAST/221-291", "SNRPA_DROME", "7LESS_DROME"),
)
BAD_QUERY = ">BAD_DIGITS a record that is bad on purpose: digits inside the sequence\nMKVLAAGIV9KWTR7DEFGHH\n"
MANIFEST = "databases.json"


@dataclasses.dataclass(frozen=True)
class Protein:
    """A name and its residues."""

    name: str
    residues: str


def main() -> int:
    """Makes what is missing or out of date; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument(
        "--examples", type=Path, default=Path(os.environ.get("FOLDFEED_EXAMPLES", DEFAULT_EXAMPLES))
    )
    args = parser.parse_args()
    if not (args.examples / "tutorial" / "globins45.fa").exists():
        print(
            f"error: no HMMER tutorial in {args.examples}; install the package hmmer-examples or give "
            "--examples DIR with the folders tutorial/ and testsuite/ of HMMER's source",
            file=sys.stderr,
        )
        return 1
    inputs = input_digest(args.examples)
    if is_current(args.out_dir, inputs):
        print(f"{args.out_dir}: databases are up to date")
        return 0
    args.out_dir.mkdir(parents=True, exist_ok=True)
    make_all(args.examples, args.out_dir)
    outputs = {str(path.relative_to(args.out_dir)): sha256(path) for path in output_files(args.out_dir)}
    text = json.dumps({"inputs": inputs, "outputs": outputs}, indent=1)
    (args.out_dir / MANIFEST).write_text(text, encoding="utf-8")
    return 0


# Without these the demo goes on with JackHMMER alone.
HHSUITE_TOOLS = ("hhblits", "hhmake", "ffindex_build")


def missing_hhsuite() -> list[str]:
    """Returns the programs of HH-suite that are not on PATH."""
    return [name for name in HHSUITE_TOOLS if shutil.which(name) is None]


def make_all(examples: Path, out: Path) -> None:
    """Writes every database and the queries."""
    real = real_proteins(examples)
    write_fasta(out / "uniref90.fasta", [*real, *decoys(real, NUM_DECOYS["uniref90.fasta"], "uniref90")])
    parts = fragments(real)
    write_fasta(out / "mgnify.fasta", [*parts, *decoys(real, NUM_DECOYS["mgnify.fasta"], "mgnify")])
    write_queries(out / "queries.fasta", real)
    print(f"{out}: {len(real)} real sequences, {sum(NUM_DECOYS.values())} decoys")
    absent = missing_hhsuite()
    if absent:
        # One of an earlier run would be searched with a program that is gone.
        shutil.rmtree(out / "hhsuite", ignore_errors=True)
        print(f"{out}: no HH-suite database, {', '.join(absent)} not on PATH (apt-get install hhsuite)")
    else:
        print(f"{out}: {make_hhsuite(examples, real, out / 'hhsuite')} HH-suite entries")


def real_proteins(examples: Path) -> list[Protein]:
    """Returns every real protein sequence of the tutorial and of HMMER's own test suite, by name, once."""
    found: dict[str, str] = {}
    sources: list[Iterable[Protein]] = [
        read_fasta(examples / "tutorial" / "HBB_HUMAN"),
        read_fasta(examples / "tutorial" / "globins45.fa"),
        read_uniprot(examples / "tutorial" / "7LESS_DROME"),
        read_fasta(examples / "easel" / "formats" / "fasta"),
    ]
    for family in FAMILIES:
        rows = read_stockholm(family_file(examples, family))
        sources.append(Protein(name, re.sub(r"[^A-Za-z]", "", row).upper()) for name, row in rows)
    for source in sources:
        for protein in source:
            found.setdefault(protein.name, protein.residues)
    return [Protein(name, residues) for name, residues in found.items()]


def decoys(real: list[Protein], count: int, key: str) -> Iterator[Protein]:
    """Yields real sequences with their residues shuffled; a function of names and numbers only."""
    for number in range(count):
        source = real[number % len(real)]
        residues = list(source.residues)
        random.Random(f"{key} {number} {source.name}").shuffle(residues)
        yield Protein(f"decoy_{key}_{number:05d}", "".join(residues))


def fragments(real: list[Protein]) -> list[Protein]:
    """Returns a piece of each real sequence that is long enough, half to all of it."""
    pieces: list[Protein] = []
    for number, protein in enumerate(real):
        rng = random.Random(f"fragment {number} {protein.name}")
        size = rng.randint(len(protein.residues) // 2, len(protein.residues))
        start = rng.randint(0, len(protein.residues) - size)
        if size >= 30:
            pieces.append(Protein(f"DEMO{number:09d}", protein.residues[start : start + size]))
    return pieces


def write_queries(path: Path, real: list[Protein]) -> None:
    """Writes the real queries and the bad one."""
    by_name = {protein.name: protein.residues for protein in real}
    # A record id has no slash, so a domain's range is set off by an underscore.
    chosen = [Protein(name.replace("/", "_"), by_name[name]) for name in QUERIES]
    write_fasta(path, chosen)
    with path.open("a", encoding="ascii") as file:
        file.write(BAD_QUERY)


def make_hhsuite(examples: Path, real: list[Protein], folder: Path) -> int:
    """Makes an HH-suite database of the family alignments and of two search results; returns its entries."""
    for tool in ("ffindex_build", "ffindex_apply", "ffindex_order", "hhmake", "jackhmmer"):
        find_binary(tool)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "entries").mkdir()
        for family in FAMILIES:
            write_a3m(work / "entries" / family, read_stockholm(family_file(examples, family)))
        write_fasta(work / "real.fasta", real)
        for protein in real:
            if protein.name in SEARCHED_ENTRIES:
                rows = search(work, protein)
                write_a3m(work / "entries" / f"{protein.name}_relatives", rows)
        build_ffindex(work)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in sorted(work.glob("db_*.ff*")):
            shutil.copyfile(file, folder / file.name)
        return len(list((work / "entries").iterdir()))


def search(work: Path, protein: Protein) -> list[tuple[str, str]]:
    """Returns the rows of a JackHMMER search among the real sequences."""
    write_fasta(work / "one.fasta", [protein])
    words = ("-o", os.devnull, "-A", "one.sto", "--noali", "-N", "1", "--cpu", "1", "-E", "1e-4")
    call(work, find_binary("jackhmmer"), *words, "--incE", "1e-4", "one.fasta", "real.fasta")
    return list(read_stockholm(work / "one.sto"))


def build_ffindex(work: Path) -> None:
    """Turns ``entries/`` into ``db_{a3m,hhm,cs219}.ff{data,index}``; the recipe of HH-suite's own wiki."""
    call(work, "ffindex_build", "-s", "db_a3m.ffdata", "db_a3m.ffindex", "entries/")
    apply = ("ffindex_apply", "-q", "db_a3m.ffdata", "db_a3m.ffindex", "-i", "db_hhm.ffindex")
    hhmake = (find_binary("hhmake"), "-i", "stdin", "-o", "stdout", "-v", "0")
    call(work, *apply, "-d", "db_hhm.ffdata", "--", *hhmake)
    library = hhsuite_data()
    states = ("-A", str(library / "cs219.lib"), "-D", str(library / "context_data.lib"))
    flags = ("-f", "-x", "0.3", "-c", "4", "-I", "a3m", *states, "-i", "db_a3m", "-o", "db_cs219", "-b")
    call(work, find_cstranslate(), *flags)
    hhm = work / "db_hhm.ffdata"
    # hhmake writes the time; a constant of equal length keeps offsets and makes equal inputs equal bytes.
    hhm.write_bytes(re.sub(rb"(?<=\nDATE  )[^\n]+", lambda date: b"-" * len(date[0]), hhm.read_bytes()))
    order = sorted(
        (line.split("\t") for line in (work / "db_cs219.ffindex").read_text().splitlines()),
        key=lambda fields: (-int(fields[2]), fields[0]),
    )
    (work / "order").write_text("".join(f"{fields[0]}\n" for fields in order))
    for part in ("a3m", "hhm"):
        old, new = (f"db_{part}.ffdata", f"db_{part}.ffindex"), (f"{part}.data", f"{part}.index")
        call(work, "ffindex_order", "order", *old, *new)
        for source, target in zip(new, old, strict=True):
            (work / source).replace(work / target)


def find_cstranslate() -> str:
    """Returns cstranslate for this processor; Debian ships it beside hhblits, but its own link is broken."""
    hhblits = Path(find_binary("hhblits"))
    beside = hhblits.with_name(hhblits.name.replace("hhblits", "cstranslate"))
    return str(beside) if beside.exists() else find_binary("cstranslate")


def hhsuite_data() -> Path:
    """Returns the folder with HH-suite's context libraries."""
    around = Path(find_binary("hhblits")).resolve().parent.parent
    places = [Path(os.environ.get("HHLIB", "/nowhere")) / "data", Path("/usr/share/hhsuite/data")]
    places += [around / "data", around / "share" / "hhsuite" / "data", Path("/usr/lib/hhsuite/data")]
    for place in places:
        if (place / "cs219.lib").exists():
            return place
    sys.exit(f"error: cs219.lib of HH-suite is in none of {[str(place) for place in places]}; set HHLIB")


def call(work: Path, *words: str) -> None:
    """Runs a program in a folder; its messages are shown only when it fails."""
    # cstranslate writes entries in the order in which its threads finish; one thread keeps the bytes equal.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=work, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def family_file(examples: Path, family: str) -> Path:
    """Returns the Stockholm file of a family; Debian compresses those above 4 kB."""
    for folder in ("tutorial", "testsuite"):
        for suffix in (".sto", ".sto.gz"):
            path = examples / folder / f"{family}{suffix}"
            if path.exists():
                return path
    sys.exit(f"error: {family}.sto is not in {examples}/tutorial or /testsuite; install hmmer-examples")


def read_text(path: Path) -> str:
    """Returns a text file, decompressed where its name says so."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def read_fasta(path: Path) -> Iterator[Protein]:
    """Yields the proteins of a FASTA file."""
    for entry in read_text(path).split(">")[1:]:
        header, _, residues = entry.partition("\n")
        yield Protein(header.split()[0], "".join(residues.split()).upper())


def read_uniprot(path: Path) -> Iterator[Protein]:
    """Yields the protein of a UniProt flat file."""
    text = read_text(path)
    residues = re.search(r"^SQ .*?\n(.*?)^//", text, re.MULTILINE | re.DOTALL)
    name = re.search(r"^ID +(\S+)", text, re.MULTILINE)
    if residues is None or name is None:
        sys.exit(f"error: {path} is no UniProt entry")
    yield Protein(name[1], "".join(residues[1].split()))


def read_stockholm(path: Path) -> Iterator[tuple[str, str]]:
    """Yields name and aligned row of a Stockholm file, in its order."""
    rows: dict[str, str] = {}
    for line in read_text(path).splitlines():
        if line.strip() and not line.startswith(("#", "//")):
            name, residues = line.split()
            rows[name] = rows.get(name, "") + residues
    yield from rows.items()


def write_fasta(path: Path, proteins: Iterable[Protein]) -> None:
    """Writes sequences in lines of 60 residues."""
    with path.open("w", encoding="ascii") as file:
        for protein in proteins:
            lines = [protein.residues[at : at + 60] for at in range(0, len(protein.residues), 60)]
            file.write(f">{protein.name}\n" + "\n".join(lines) + "\n")


def write_a3m(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes an alignment as A3M: columns of the first row in upper case, others as lower-case insertions."""
    table = list(rows)
    is_column = [letter.isalpha() for letter in table[0][1]]
    with path.open("w", encoding="ascii") as file:
        for name, row in table:
            letters = [
                (letter.upper() if letter.isalpha() else "-")
                if column
                else (letter.lower() if letter.isalpha() else "")
                for letter, column in zip(row, is_column, strict=True)
            ]
            file.write(f">{name}\n{''.join(letters)}\n")


def sha256(path: Path) -> str:
    """Returns the sha256 (hex) of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def input_digest(examples: Path) -> str:
    """Returns a digest over this script, the tutorial's files and the tools."""
    tutorial = ("HBB_HUMAN", "globins45.fa", "7LESS_DROME")
    files = [Path(__file__), *(examples / "tutorial" / name for name in tutorial)]
    files += [examples / "easel" / "formats" / "fasta"]
    files += [family_file(examples, family) for family in FAMILIES]
    tools = ("jackhmmer", *(() if missing_hhsuite() else HHSUITE_TOOLS))
    files += [Path(find_binary(name)) for name in tools]
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()


def output_files(out: Path) -> list[Path]:
    """Returns what this script writes, besides its manifest."""
    names = ("uniref90.fasta", "mgnify.fasta", "queries.fasta")
    return [*(out / name for name in names), *sorted((out / "hhsuite").glob("db_*"))]


def is_current(out: Path, inputs: str) -> bool:
    """Returns whether the outputs are those that these inputs gave before."""
    if not (out / MANIFEST).exists():
        return False
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    if manifest["inputs"] != inputs:
        return False
    return all(
        (out / name).exists() and sha256(out / name) == digest for name, digest in manifest["outputs"].items()
    )


if __name__ == "__main__":
    sys.exit(main())
