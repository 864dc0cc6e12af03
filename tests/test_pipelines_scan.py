"""The fast scan computes HMMER's own numbers: filters, lengths, what passes, how FASTA is read."""

import itertools
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyhmmer", reason="pip install 'foldfeed[fast]'")

import scan_data
from hypothesis import given, settings
from hypothesis import strategies as st
from pyhmmer import easel
from scan_data import digital, drawn, drawn_query, drawn_targets, hmmer_profile, write_targets

from foldfeed.pipelines.errors import KernelError, ToolNotFoundError, UnreadableDatabaseError
from foldfeed.pipelines.fast_scan import choice as scan_choice
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan import memory as scan_memory
from foldfeed.pipelines.fast_scan import scan
from foldfeed.pipelines.fast_scan.choice import best_kernel, check_kernel, seconds_per_cell
from foldfeed.pipelines.fast_scan.database import SYMBOLS, ScanDatabase, codes_of_bytes
from foldfeed.pipelines.fast_scan.kernels import PAD, digitise, kernels

if scan_kernels.library_path() is None:
    pytest.skip("installed without the scan's kernels (no C compiler)", allow_module_level=True)

USABLE = [kernel for kernel in kernels() if kernel.usable]


def nats(profile, j: int, length_cost: int) -> float:
    """HMMER's last lines of both filters, in its float."""
    score = np.float32(j - length_cost) - np.float32(profile.base)
    return float(np.float32(np.float64(score / np.float32(profile.scale)) - 3.0))


def short_score(profile, best: int, length_cost: int) -> float | None:
    """HMMER's SSV filter, from the best cell: None where it leaves the answer to MSV."""
    begin = profile.base - length_cost - profile.tbm
    end = begin + best + 128
    if length_cost + profile.tbm + profile.tec + profile.bias >= 127:
        return None
    if best >= -1 - profile.bias:
        return math.inf if begin >= 128 else None
    if end >= 255 - profile.bias:
        return math.inf
    return None if end - profile.tec > profile.base else nats(profile, end - profile.tec, length_cost)


@pytest.mark.parametrize("kernel", USABLE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_hmmers_filters(kernel, seed, tmp_path):
    random = np.random.default_rng(seed)
    kinds = set()
    for _ in range(4):
        query = drawn_query(random)
        targets = drawn_targets(random, query, 2 * kernel.lanes + 3)
        write_targets(tmp_path / "t.fasta", targets)
        (chunk,) = ScanDatabase(str(tmp_path / "t.fasta"), kernel).chunks()
        profile, hmmer = scan.profile_of(query), hmmer_profile(query)
        best = scan.best_cells([profile], chunk, kernel=kernel)[0]
        full = scan.msv_scores(profile, chunk, np.arange(len(targets)), kernel=kernel)
        for lane, number in enumerate(chunk.order):
            hmmer.L = len(targets[number])
            short = short_score(profile, int(best[lane]), hmmer.tjb)
            msv = math.inf if full[lane] == 255 else nats(profile, int(full[lane]), hmmer.tjb)
            theirs = hmmer.ssv_filter(digital(targets[number]))
            # pyhmmer gives NaN where HMMER's short filter gives no result.
            assert short == (None if theirs is None or math.isnan(theirs) else theirs)
            assert (msv if short is None else short) == hmmer.msv_filter(digital(targets[number]))
            kinds.add("msv" if short is None else "overflow" if short == math.inf else "short")
    assert kinds == {"msv", "overflow", "short"}


def test_repeats_are_worth_more_than_their_best_copy(tmp_path):
    """The J state: a target that only HMMER's second, slower form lets through."""
    random = np.random.default_rng(1)
    query = drawn(random, 200)
    # A piece worth a little more than J costs, many times.
    counts = {False: 0, True: 0}
    targets = [
        drawn(random, 9).join([query[50 : 50 + length]] * 30) for length in range(8, 24) for _ in range(3)
    ]
    write_targets(tmp_path / "t.fasta", targets)
    kernel = best_kernel()
    (chunk,) = ScanDatabase(str(tmp_path / "t.fasta"), kernel).chunks()
    profile, hmmer = scan.profile_of(query), hmmer_profile(query)
    for f1 in (1e-3, 1e-5, 1e-7, 1e-9):
        found = scan.survivors([profile], chunk, f1=f1, kernel=kernel, safety_bits=0.0)[0]
        expected = [number for number, text in enumerate(targets) if passes(hmmer, text, f1)]
        assert found.records.tolist() == expected
        counts[found.num_msv > 0] += 1
    assert counts[True]


def passes(hmmer, text: str, f1: float) -> bool:
    """HMMER's rule, with Python's logarithms."""
    hmmer.L = length = len(text)
    mu, slope = hmmer.evalue_parameters.as_vector()[:2]
    null = length * math.log(length / (length + 1)) + math.log(1 - length / (length + 1))
    bits = (hmmer.msv_filter(digital(text)) - null) / math.log(2)
    return -math.expm1(-math.exp(-slope * (bits - mu))) <= f1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("f1", [0.9, 0.02, 0.0005])
def test_what_passes_is_what_hmmers_scores_let_pass(seed, f1, tmp_path):
    random = np.random.default_rng(seed)
    query = drawn_query(random)
    targets = drawn_targets(random, query, 150)
    write_targets(tmp_path / "t.fasta", targets)
    (chunk,) = ScanDatabase(str(tmp_path / "t.fasta"), best_kernel()).chunks()
    profile, hmmer = scan.profile_of(query), hmmer_profile(query)
    expected = {number for number, text in enumerate(targets) if passes(hmmer, text, f1)}
    exact, safe = (
        scan.survivors([profile], chunk, f1=f1, kernel=best_kernel(), safety_bits=bits)[0].records
        for bits in (0.0, scan.SAFETY_BITS)
    )
    assert set(exact.tolist()) == expected
    assert set(safe.tolist()) >= expected


def test_chunks_batches_and_threads_change_nothing(tmp_path):
    random = np.random.default_rng(2)
    queries = [drawn_query(random) for _ in range(2 * scan.BATCH + 5)]
    targets = [text for query in queries[:20] for text in drawn_targets(random, query, 20)]
    path = tmp_path / "t.fasta"
    write_targets(path, targets)
    profiles = [scan.profile_of(query) for query in queries]
    kernel = best_kernel()

    def found(chunk_bytes: int, threads: int, at_once: bool) -> list[list[int]]:
        passing: list[list[int]] = [[] for _ in profiles]
        before = 0
        for chunk in ScanDatabase(str(path), kernel, chunk_bytes=chunk_bytes).chunks():
            groups = [profiles] if at_once else [[profile] for profile in profiles]
            results = [
                result
                for group in groups
                for result in scan.survivors(group, chunk, f1=0.02, kernel=kernel, threads=threads)
            ]
            for numbers, result in zip(passing, results, strict=True):
                numbers += (result.records + before).tolist()
            before += chunk.num_records
        assert before == len(targets)
        return passing

    whole = found(path.stat().st_size, 1, True)
    assert sum(map(len, whole)) > 100
    for parts in (7, 64):
        assert found(path.stat().st_size // parts, 3, parts == 7) == whole


def test_the_least_score_that_passes_is_that_of_a_list_of_all():
    lengths = np.unique(np.geomspace(1, 100_000, 400).astype(np.int64))
    for query in ("M", "W" * 60, drawn(np.random.default_rng(4), 700)):
        profile = scan.profile_of(query)
        for f1 in (1.0, 0.9, 0.02, 0.0005, 1e-12, 1e-300):
            found, costs = scan._least_j(profile, lengths, f1, scan.SAFETY_BITS)
            scores = scan.filter_bits(
                np.arange(256), costs[:, None], lengths[:, None], profile.base, profile.scale
            )
            least = scan.least_score(f1, profile.mu, profile.slope) - scan.SAFETY_BITS
            assert (found == (scores < least).sum(axis=1)).all(), (query, f1)


def test_length_costs_are_hmmers():
    profile = hmmer_profile("MKTAYIAKQR")
    lengths = np.unique(np.concatenate([np.arange(1, 3000), np.geomspace(3000, 100_000, 200).astype(int)]))
    costs = scan_kernels.length_costs(lengths, profile.scale_b)
    for length, cost in zip(lengths, costs, strict=True):
        profile.L = int(length)
        assert profile.tjb == cost, length


def test_profiles_do_not_depend_on_what_was_built_before():
    first = scan.profile_of("MKTAYIAKQRQISFVKSHFSRQ")
    scan.profile_of("WWWWHHHHCCCC")
    again = scan.profile_of("MKTAYIAKQRQISFVKSHFSRQ")
    assert (first.mu, first.slope) == (again.mu, again.slope)
    assert (first.biased == again.biased).all()
    hmmer = hmmer_profile("MKTAYIAKQRQISFVKSHFSRQ")
    striped = np.asarray(hmmer.sbv).view(np.int8).reshape(len(SYMBOLS), -1, 16)
    position = np.arange(len(first))
    assert (striped[:, position % 2, position // 2] == first.signed[:, : len(SYMBOLS)].T).all()


def test_short_simulations_leave_the_first_filters_statistics_as_they_are(monkeypatch):
    """Mu and lambda are those of HMMER's own lengths, to the bit; also where the short ones fit nothing."""
    random = np.random.default_rng(9)
    queries = ["M", "WW", "A" * 120, "X" * 30, "QQQQPQ" * 30, drawn(random, 1500)]
    queries += [drawn_query(random) for _ in range(25)]
    for query in queries:
        profile, hmmer = scan.profile_of(query), hmmer_profile(query)
        assert (profile.mu, profile.slope) == tuple(hmmer.evalue_parameters.as_vector()[:2]), query

    class FitsNothing:
        def build(self, *_):
            raise ValueError("Could not build HMM: failed to determine fwd tau")

    monkeypatch.setattr(scan._local, "quick", FitsNothing())
    again = scan.profile_of(queries[-1])
    assert (again.mu, again.slope) == (profile.mu, profile.slope)


def test_a_target_that_hmmer_refuses_is_left_to_hmmer(tmp_path):
    path = tmp_path / "t.fasta"
    write_targets(path, ["A" * 100_001, "", "G" * 100_000])
    (chunk,) = ScanDatabase(str(path), best_kernel()).chunks()
    profile = scan.profile_of("MKTAYIAKQRQISFVKSHFSRQ")
    found = scan.survivors([profile], chunk, f1=1e-9, kernel=best_kernel())[0]
    assert found.records.tolist() == [0]


@pytest.mark.parametrize("lanes", [1, 16, 32, 64])
def test_targets_that_lie_one_after_the_other_are_put_side_by_side(lanes):
    """A device's layout, of which the processor takes what the device leaves to it."""
    random = np.random.default_rng(lanes)
    lengths = np.sort(random.integers(0, 40, size=75))
    codes = random.integers(0, PAD, size=int(lengths.sum()), dtype=np.uint8)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    single = scan_kernels.pack(codes, starts, np.arange(75), 1)
    assert (single.rows == -(-lengths // 4) * 4).all()
    for offset, rows, start, length in zip(single.offsets, single.rows, starts, lengths, strict=False):
        assert (single.codes[offset : offset + length] == codes[start : start + length]).all()
        assert (single.codes[offset + length : offset + rows] == PAD).all()
    chosen = np.flatnonzero(random.integers(2, size=75))
    gathered = scan_kernels.gather(single, chosen, lengths[chosen], lanes)
    expected = scan_kernels.pack(codes, starts, chosen, lanes)
    assert (gathered.codes == expected.codes).all()
    assert (gathered.offsets == expected.offsets).all()


@pytest.mark.parametrize("kernel", USABLE, ids=lambda kernel: kernel.name)
def test_kernels_agree_with_plain_c(kernel):
    check_kernel(kernel)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_kernels_stay_within_their_memory(tmp_path):
    """The same comparison in C, where every access outside a buffer and every undefined step is an error."""
    program = tmp_path / "kernels_agree"
    source = Path(__file__).parent / "kernels_agree.c"
    flags = (
        "-O1",
        "-DROUNDS=3",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    )
    subprocess.run(["gcc", *flags, str(source), "-o", str(program), "-lm"], check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words = [kernel.name for kernel in USABLE if kernel.name != "plain"]
    assert done.stdout.startswith(" ".join([*words, "against plain C: 0 of"]))


def test_a_kernel_with_other_scores_is_refused(monkeypatch):
    scores = scan_kernels.ssv

    def wrong(kernel, *args, **kwargs):
        out = scores(kernel, *args, **kwargs)
        out[0, 0] += kernel.number != 0
        return out

    monkeypatch.setattr(scan_kernels, "ssv", wrong)
    with pytest.raises(KernelError, match=r"1 of .* scores"):
        check_kernel(USABLE[-1])


def test_the_fastest_kernel_is_taken_whatever_its_width(monkeypatch):
    assert all(seconds_per_cell(kernel) > 0 for kernel in USABLE)
    for slow in USABLE[-2:]:
        monkeypatch.setattr(scan_choice, "seconds_per_cell", lambda kernel, slow=slow: kernel == slow)
        best_kernel.cache_clear()
        chosen = best_kernel()
        assert chosen.name != "plain"
        assert chosen in USABLE[-2:]
        assert chosen != slow or len(USABLE) < 3
    best_kernel.cache_clear()


def test_a_score_may_not_cross_the_end_of_a_sequence(tmp_path):
    write_targets(tmp_path / "t.fasta", ["MKTAYIAK"])
    (chunk,) = ScanDatabase(str(tmp_path / "t.fasta"), best_kernel()).chunks()
    table = np.zeros((1, 32), dtype=np.int8)
    with pytest.raises(ValueError, match=f"column {PAD}"):
        scan_kernels.ssv(best_kernel(), chunk.blocks, table, np.zeros(1, np.uint8), np.array([0, 1]))


def test_missing_kernels_are_named(monkeypatch):
    scan_kernels._library.cache_clear()
    monkeypatch.setattr(scan_kernels, "library_path", lambda: None)
    with pytest.raises(ToolNotFoundError, match="C compiler"):
        scan_kernels.length_costs(np.array([1]), 1.0)


def test_kernels_of_another_version_are_named_and_not_used(monkeypatch):
    monkeypatch.setattr(scan_kernels, "_INTERFACE", -1)
    scan_kernels._library.cache_clear()
    try:
        with pytest.raises(ToolNotFoundError, match="another version than the Python beside them"):
            scan_kernels.length_costs(np.array([1]), 1.0)
        assert not scan_kernels.is_usable()
    finally:
        scan_kernels._library.cache_clear()


LINES = st.text(alphabet=scan_data.RESIDUES + "acxXBZJUO* \t\r", max_size=30)
HEADERS = st.from_regex(r"[ \t]{0,2}[!-~]{1,12}( [ -~\t]{0,20})?", fullmatch=True)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(HEADERS, st.lists(LINES, max_size=4)), min_size=1, max_size=6), st.booleans())
def test_fasta_is_read_as_hmmer_reads_it(tmp_path_factory, records, ends):
    text = "\n".join(f">{header}\n" + "\n".join(lines) for header, lines in records) + "\n" * ends
    path = tmp_path_factory.mktemp("fasta") / "x.fasta"
    path.write_text(text)
    codes, _, starts = digitise(np.frombuffer(text.encode(), dtype=np.uint8), codes_of_bytes())
    with easel.SequenceFile(path, format="fasta", digital=True, alphabet=scan_data.ALPHABET) as file:
        theirs = [bytes(sequence.sequence) for sequence in file]
    assert [bytes(codes[a:b]) for a, b in itertools.pairwise(starts)] == theirs


@pytest.mark.parametrize(
    ("text", "kind", "position"),
    [
        (b"MK\n>a\nM\n", "before", 0),
        (b">a\nMK\n>\nMK\n", "name", 6),
        (b">a\nMK-K\n", "residue", 5),
        (b">a\nM1\n", "residue", 4),
        (b">a\nM\xc3\xa4\n", "residue", 4),
        (b">a\nM\x00\n", "residue", 4),
    ],
)
def test_text_that_hmmer_refuses_is_refused_with_its_place(tmp_path, text, kind, position):
    path = tmp_path / "x.fasta"
    path.write_bytes(text)
    with pytest.raises(UnreadableDatabaseError, match=kind) as caught:
        list(ScanDatabase(str(path), best_kernel()).chunks())
    assert f"byte {position} " in str(caught.value)


def test_databases_in_memory_stay_below_their_share(tmp_path, monkeypatch):
    """Those that are read keep their place, idle ones go, and what has no room is streamed."""
    monkeypatch.setattr(scan_memory, "_memory_bytes", lambda: 4 * 2500)
    kernel = best_kernel()
    found = []
    for name in "abcd":
        path = tmp_path / name
        path.write_text("".join(f">{name}{number}\n{'ACDEFGHIKL' * 9}\n" for number in range(10)))
        found.append(ScanDatabase(str(path), kernel))
    a, b, c, d = found
    assert 2 * a.num_bytes < 2500 < 3 * a.num_bytes
    reading_a, reading_b = a.chunks(), b.chunks()
    assert next(reading_a).num_records == next(reading_b).num_records == 10
    # Both are being read: no room for a third, which is read all the same and not kept.
    assert [chunk.num_records for chunk in c.chunks()] == [10]
    assert [one._passes.num_kept for one in (a, b, c)] == [1, 1, 0]
    list(reading_a)
    # Now the first is idle and makes room.
    assert [chunk.num_records for chunk in d.chunks()] == [10]
    assert [one._passes.num_kept for one in (a, b, d)] == [0, 1, 1]
    reading_b.close()
    assert a.num_records == 10
    assert not scan_memory._RESIDENT._readers


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_searches_that_run_together_share_the_reading(tmp_path, monkeypatch, share):
    """Whoever joins, whenever: every chunk once; what does not stay in memory is not read once for each."""
    monkeypatch.setattr(scan_memory, "RESIDENT_SHARE", share)
    path = tmp_path / "t.fasta"
    path.write_text("".join(f">t{number}\n{'ACDEFGHIKL' * (1 + number % 7)}\n" for number in range(500)))
    database = ScanDatabase(str(path), best_kernel(), chunk_bytes=path.stat().st_size // 9)
    expected = [int(chunk.starts[0]) for chunk in database.chunks()]
    assert len(expected) > 9
    assert expected == sorted(expected)
    reads: list[int] = []
    read_chunk = database.read_chunk

    def counted(start):
        reads.append(start)
        return read_chunk(start)

    monkeypatch.setattr(database, "read_chunk", counted)
    # The k-th reader comes when the first has had k chunks; all go on in step, in another order each time.
    random = np.random.default_rng(3)
    readers = [database.chunks()]
    seen: list[list[int]] = [[]]
    ended = 0
    while ended < 4:
        ended = 0
        for number in random.permutation(len(readers)):
            chunk = next(readers[number], None)
            ended += chunk is None
            if chunk is not None:
                seen[number].append(int(chunk.starts[0]))
        if len(readers) < 4:
            readers.append(database.chunks())
            seen.append([])
            ended = 0
    assert all(sorted(one) == expected for one in seen)
    assert seen[3] != expected or share
    # Alone each would have read all.
    assert len(reads) == 0 if share else len(reads) <= 2 * len(expected)
    assert database.num_records == 500
    assert database._passes._shown is None
