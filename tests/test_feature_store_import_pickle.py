"""A pickle is data here, never a program: nothing that a file asks for is run, imported or allocated."""

import collections
import contextlib
import datetime
import functools
import gzip
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.feature_store.exchange_errors import UnsafePickleError
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.importers.rows import ImportOptions
from foldfeed.feature_store.parsers import pickle as safe_pickle
from foldfeed.feature_store.parsers.pickle import load_pickled_arrays

PLAIN = {
    "c": np.arange(12.0).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
    "object": np.array([b"x", "y", None, 3], dtype=object),
    "bytes": np.array([b"ab", b"c"]),
    "text": np.array(["a\u00e9", "c"]),
    "empty": np.zeros((0, 5), "i4"),
    "empty_text": np.array(["", ""]),
    "big_endian": np.arange(3, dtype=">i8"),
    "big_endian_text": np.array(["ab"], dtype=">U3"),
    "bool": np.array([True, False]),
    "point": np.array(5),
    "scalar": np.float32(3),
    "list": [1, 2, (3, np.ones(2)), {"k": np.zeros(1)}],
    "raw": b"\xff\x00",
    "no_bytes": b"",
}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_containers_of_every_protocol(protocol):
    got = load_pickled_arrays(pickle.dumps(PLAIN, protocol=protocol), "x.pkl")
    assert got.keys() == PLAIN.keys()
    for name, want in PLAIN.items():
        if isinstance(want, np.ndarray):
            assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape), name
            np.testing.assert_array_equal(got[name], want)
    np.testing.assert_array_equal(got["list"][2][1], np.ones(2))
    np.testing.assert_array_equal(got["list"][3]["k"], np.zeros(1))
    assert (got["raw"], got["no_bytes"], got["scalar"]) == (PLAIN["raw"], b"", 3)


class Runs:
    """Unpickling this calls something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker: str) -> dict[str, object]:
    shell = f"touch {marker}"
    return {
        "os.system": Runs(os.system, shell),
        "subprocess": Runs(subprocess.call, ["touch", marker]),
        "eval": Runs(eval, f"open({marker!r}, 'w')"),
        "nested": {"msa": [1, (2, {"deep": Runs(os.system, shell)})]},
        "in an object array": np.array([Runs(os.system, shell)], dtype=object),
        "numpy.load": Runs(np.load, marker),
        "numpy.fromfile": Runs(np.fromfile, "/etc/passwd"),
        "numpy.memmap": Runs(np.memmap, marker, "u1", "w+"),
        "getattr": Runs(getattr, "text", "upper"),
        "partial": functools.partial(os.system, shell),
        "a class": collections.OrderedDict(a=1),
        "a date": datetime.date(2020, 1, 1),
        "an open file": Runs(open, marker, "w"),
        "nested reduce": Runs(functools.reduce, Runs(os.system, shell), [1, 2]),
        "a structured dtype": np.zeros(2, dtype=[("a", "i4")]),
        "a datetime array": np.zeros(2, dtype="M8[s]"),
        "a masked array": np.ma.array([1], mask=[0]),
        "a set": {1, 2},
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", sorted(attacks("x")))
def test_what_is_no_array_is_refused_and_has_no_effect(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    before = set(sys.modules)
    data = pickle.dumps({"msa": np.zeros((1, 1), int), "x": attacks(str(marker))[name]}, protocol=protocol)
    with pytest.raises(UnsafePickleError) as caught:
        load_pickled_arrays(data, "features.pkl")
    assert str(caught.value).startswith("features.pkl: ")
    assert len(str(caught.value)) < 500
    assert not marker.exists()
    assert set(sys.modules) == before


def hand_made() -> dict[str, bytes]:
    """Pickles that no pickler writes."""
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00i4\x89\x88tR"

    def array(shape: bytes, raw: bytes) -> bytes:
        return reconstruct + b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"

    start = b"\x80\x04}X\x01\x00\x00\x00k"
    huge = b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft"
    return {
        "shape without data": start + array(huge, b"C\x00") + b"s.",
        "negative shape": start + array(b"(J\xff\xff\xff\xfft", b"C\x00") + b"s.",
        "shape of booleans": start + array(b"(\x88t", b"C\x04abcd") + b"s.",
        "huge object array": start
        + array(huge, b"]").replace(b"X\x02\x00\x00\x00i4", b"X\x01\x00\x00\x00O")
        + b"s.",
        "huge item size": start
        + array(b"(K\x01t", b"C\x00").replace(b"X\x02\x00\x00\x00i4", b"X\x0a\x00\x00\x00U999999999")
        + b"s.",
        "a million million empty texts": start
        + array(b"(J\xff\xff\xff\x7ft", b"C\x00").replace(b"X\x02\x00\x00\x00i4", b"X\x02\x00\x00\x00U0")
        + b"s.",
        "no element of 4 GB": start
        + array(b"(K\x00t", b"C\x00").replace(b"X\x02\x00\x00\x00i4", b"X\x0a\x00\x00\x00U999999999")
        + b"s.",
        "unfinished array": start + reconstruct + b"s.",
        "two states": start + array(b"(K\x01t", b"C\x04abcd") + b"(K\x01(tI1\n\x89C\x00tbs.",
        "bytearray of 2^60": start + b"\x96" + struct.pack("<Q", 1 << 60) + b"s.",
        "bytes of 2^60": start + b"\x8e" + struct.pack("<Q", 1 << 60) + b"s.",
        "calls a string": start + b"X\x02\x00\x00\x00hi)Rs.",
        "state of a list": start + b"]K\x01bs.",
        "inst": b"(S'touch x'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nX\x07\x00\x00\x00touch xo.",
        "newobj": b"\x80\x02cos\nsystem\nX\x07\x00\x00\x00touch x\x85\x81.",
        "persistent id": b"\x80\x04X\x01\x00\x00\x00xQ.",
        "extension": b"\x80\x04\x82\x01.",
        "out of band": b"\x80\x05\x97.",
        "global split by a dot": b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93.",
        "global of a number": b"\x80\x04K\x01K\x02\x93.",
        "mark as a value": b"\x80\x04}(K\x01s.",
        "no stop": b"\x80\x04}",
        "nothing": b"",
        "two results": b"\x80\x04}}.",
        "a list": b"\x80\x04].",
        "number keys": b"\x80\x04}K\x01K\x02s.",
        "a tuple as a key": b"\x80\x04}K\x01\x85K\x02s.",
        "a list that holds itself": b"\x80\x04}X\x01\x00\x00\x00k]\x94h\x00as.",
        "missing memo": b"\x80\x04h\x05.",
        "text no codec knows": b"\x80\x04X\x02\x00\x00\x00\xff\xff.",
        "long text number": b"I" + b"9" * 10_000 + b"\n.",
    }


@pytest.mark.parametrize("name", sorted(hand_made()))
def test_hand_made_pickles_are_refused_in_little_memory(name):
    data = hand_made()[name]
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePickleError):
            load_pickled_arrays(data, "x")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_memo_entry_costs_the_same_whatever_its_number():
    # CPython's own unpickler makes a table of two billion entries for this one.
    tracemalloc.start()
    assert load_pickled_arrays(b"\x80\x04}r\xff\xff\xff\x7f(X\x01\x00\x00\x00kK\x01u.", "x") == {"k": 1}
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_sharing_does_not_explode():
    value: object = np.ones(1)
    for _ in range(14):
        value = [value, value, value, value]
    got = load_pickled_arrays(pickle.dumps({"k": value}), "x")
    for _ in range(14):
        got = got["k"] if isinstance(got, dict) else got[0]
    deep: object = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(UnsafePickleError, match="nested deeper"):
        load_pickled_arrays(pickle.dumps({"k": deep}), "x")


def test_opcodes_are_counted(monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_OPERATIONS", 1000)
    with pytest.raises(UnsafePickleError, match="more than 1000 opcodes"):
        load_pickled_arrays(pickle.dumps({"k": list(range(5000))}), "x")


def test_a_pickle_that_unpacks_to_too_much_is_a_reject(tmp_path):
    folder = tmp_path / "T1"
    folder.mkdir()
    (folder / "features.pkl.gz").write_bytes(gzip.compress(bytes(64 << 20)))
    found = AlignmentImport(tmp_path, options=ImportOptions(max_bytes=1 << 20))
    tracemalloc.start()
    assert list(found) == []
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert "more than 1048576 bytes" in found.rejects[0].reason


def features(**changes):
    made = {
        "sequence": np.array([b"ACDE"], dtype=object),
        "domain_name": np.array([b"a domain"], dtype=object),
        "msa": np.array([[0, 1, 2, 3], [0, 20, 21, 3]], dtype=np.int32),
        "deletion_matrix_int": np.array([[0, 0, 0, 0], [0, 7, 0, 0]], dtype=np.int32),
        "msa_species_identifiers": np.array([b"", b"HUMAN"], dtype=object),
    }
    made.update(changes)
    return {name: value for name, value in made.items() if value is not None}


def read_features(tmp_path, made):
    folder = tmp_path / "T1"
    folder.mkdir(exist_ok=True)
    (folder / "features.pkl").write_bytes(pickle.dumps(made, protocol=4))
    found = AlignmentImport(folder)
    return list(found), found.rejects


def test_a_feature_dictionary_becomes_a_record(tmp_path):
    (record,), _ = read_features(tmp_path, features(template_sequence=np.array([b"x"], dtype=object)))
    assert (record.record_id, record.description, record.sequence) == ("T1", "a domain", "ACDE")
    assert record.msa.tolist() == [[0, 4, 3, 6], [0, 20, 21, 6]]
    assert record.deletions.tolist() == [[0, 0, 0, 0], [0, 7, 0, 0]]
    assert record.rows.species == ["", "HUMAN"]
    (record,), _ = read_features(
        tmp_path, features(sequence=np.array(["ACDE"]), msa_species_identifiers=None)
    )
    assert record.rows.species == ["", ""]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"msa": None}, "'msa' must be there"),
        ({"msa": np.zeros(4, int)}, "'msa' must be there, with integers of"),
        ({"msa": np.zeros((2, 4))}, "'msa' must be there, with integers of"),
        ({"msa": np.full((2, 4), 22)}, "values 22 to 22; 0 to 21"),
        ({"msa": np.zeros((2, 3), int)}, "must be equal"),
        ({"msa": np.array([[1, 1, 2, 3], [0, 0, 0, 0]])}, "they differ at residue 1"),
        ({"deletion_matrix_int": np.full((2, 4), -1)}, "values -1 to -1"),
        ({"deletion_matrix_int": np.full((2, 4), 1 << 40)}, "are possible"),
        ({"sequence": None}, "'sequence' must be there"),
        ({"sequence": np.array([b"AC-E"], dtype=object)}, "has '-' at residue 3"),
        ({"sequence": np.array([b"ACD\xff"], dtype=object)}, "at residue 4"),
        ({"msa_species_identifiers": np.array([b""], dtype=object)}, "one entry per row"),
        ({"asym_id": np.zeros(4)}, "features of a complex"),
    ],
)
def test_bad_features_are_rejects(tmp_path, changes, reason):
    records, rejects = read_features(tmp_path, features(**changes))
    assert records == []
    assert reason in rejects[0].reason


CODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(CODES),
            st.binary(max_size=9),
            st.sampled_from(
                [b"numpy\nndarray\n", b"numpy\ndtype\n", b"os\nsystem\n", b"\x02\x00\x00\x00i4", b"0\n"]
            ),
        ),
        max_size=40,
    ).map(b"".join)
)
def test_any_opcodes_give_a_dictionary_or_the_typed_error(data):
    with contextlib.suppress(UnsafePickleError):
        assert isinstance(load_pickled_arrays(data, "x"), dict)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_of_a_real_pickle_gives_arrays_or_the_typed_error(data):
    original = pickle.dumps(features(), protocol=data.draw(st.integers(0, 5)))
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(changed)))
    for text in (bytes(changed), bytes(changed[:cut])):
        try:
            got = load_pickled_arrays(text, "x")
        except UnsafePickleError:
            continue
        assert all(type(key) is str for key in got)
        io.BytesIO().write(repr(got)[:1000].encode("utf-8", errors="replace"))
