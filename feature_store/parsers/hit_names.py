"""What the names of rows say: hit ids, species, scores of MMseqs2; and record ids from names of any kind.

Pure functions. Owns the patterns; `foldfeed.pipelines` has its own copy of the species rule until both can
share one.

Source: AlphaFold 2 ``data/msa_identifiers.py``; MMseqs2 ``result2msa --msa-format-mode 6``.
"""

from __future__ import annotations

import hashlib
import math
import re

from foldfeed.feature_store.format.record import PAIRING_KEY_BYTES, SPECIES_BYTES

# tr|A0A146SKV9|A0A146SKV9_FUNHE and, as small BFD writes it, with _1 behind the accession or the whole name.
_UNIPROT = re.compile(
    r"(?:tr|sp)\|[A-Za-z0-9]{6,10}(?:_\d)?\|[A-Za-z0-9]+(?:_\d)?_(?P<species>[A-Za-z0-9]{1,5})(?:_\d+)?"
)
# A bare UniProt entry name, HBB_HUMAN: mnemonics have 3 to 5 characters, a letter among them.
_ENTRY_NAME = re.compile(r"(?:[A-Z0-9]{1,6}|[A-Z0-9]{10})_(?P<species>(?=[0-9]*[A-Z])[A-Z0-9]{3,5})")
# Ids have at most seven digits so far; more would not fit the format.
_TAXONOMY = re.compile(r"\s(?:TaxID|OX)=(\d{1,9})(?=\s|$)")
_ILLEGAL_IN_ID = re.compile(r"[^A-Za-z0-9_.|:+=@-]+")
_ID_LENGTH = 255
# Characters of ids that names of files cannot hold, as `exporters.formats.file_name` writes them.
_CODES = {"%7C": "|", "%3A": ":"}
_DIGEST_DIGITS = PAIRING_KEY_BYTES - len("sha256:")
MAX_BITS = 1e9


def first_word(header: str) -> str:
    """Returns the name in a header, without the description."""
    words = header.split(maxsplit=1)
    return words[0] if words else ""


def mmseqs_scores(header: str) -> tuple[float, float]:
    """Returns E-value and bit score of an MMseqs2 header, NaN where it is none.

    Source: MMseqs2 ``result2msa --msa-format-mode 6``.
    """
    fields = header.split("\t")
    if len(fields) < 10:
        return math.nan, math.nan
    try:
        e_value, bits = float(fields[3]), float(fields[1])
    except ValueError:
        return math.nan, math.nan
    # A name with tabs in it may be anything; scores that no search gives are none.
    return (e_value, bits) if 0 <= e_value < math.inf and abs(bits) < MAX_BITS else (math.nan, math.nan)


def taxonomy_id_of(header: str) -> int:
    """Returns the NCBI taxonomy id in a row's description, 0 where it has none.

    UniRef writes ``TaxID=9606``, UniProt ``OX=9606``.
    """
    found = _TAXONOMY.search(header)
    return int(found[1]) if found else 0


def species_of(hit_id: str) -> str:
    """Returns the UniProt species mnemonic in a row's name, or "".

    ``tr|A0A146SKV9|A0A146SKV9_FUNHE/1-90`` gives ``FUNHE``, ``HBB_HUMAN/1-146`` gives ``HUMAN``.
    """
    name = hit_id.partition("/")[0]
    found = _UNIPROT.fullmatch(name) or _ENTRY_NAME.fullmatch(name)
    return found.group("species") if found else ""


def fit_species(name: str) -> str:
    """Returns a species name when the format can hold it, else ""."""
    return name if name.isascii() and name.isprintable() and len(name) <= SPECIES_BYTES else ""


def fit_pairing_key(key: str) -> str:
    """Returns a key as the format can hold it: as it is, or a digest of it where it is too long or not ASCII.

    Keys are only ever compared, so a digest pairs what the key paired.
    """
    if key.isascii() and "\0" not in key and len(key) <= PAIRING_KEY_BYTES:
        return key
    return "sha256:" + hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()[:_DIGEST_DIGITS]


def name_in_file(name: str) -> str:
    """Returns the name that a file's name stands for: exports write ``|`` and ``:`` as their codes."""
    for code, character in _CODES.items():
        name = name.replace(code, character)
    return name


def make_id(name: str) -> str:
    """Returns a name as a record id: every run of characters that an id cannot hold becomes one ``_``.

    ``"job 1/A"`` gives ``job_1_A``, the file name ``a%7Cb`` gives ``a|b``. The empty string comes back as
    it is and is refused later.
    """
    text = _ILLEGAL_IN_ID.sub("_", name_in_file(name))
    return ("_" + text if text and not (text[0].isalnum() or text[0] == "_") else text)[:_ID_LENGTH]
