"""Storage behind URLs without a server: options, retries, storages that are not safe to write to."""

import dataclasses
import errno
import http.server
import pickle
import ssl
import threading
import uuid
from importlib.util import find_spec

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from records import make_record

from foldfeed.feature_store import (
    CorruptDataError,
    FeatureStore,
    MissingExtraError,
    StorageError,
    StorageFullError,
    StorageRefusedError,
    StoreSettings,
    StoreUrlError,
    write_part,
)
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.garbage import collect_garbage
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.storage import open_blobs, retries
from foldfeed.feature_store.storage.options import delta_options, fsspec_options
from foldfeed.feature_store.storage.retries import RetryPolicy, retrying

SETTINGS = StoreSettings(tile_rows=16, tile_cols=16)


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_any_file_system_that_creates_exclusively_holds_a_store(memory, tmp_path):
    """fsspec's files in memory, where delta-rs cannot go."""
    store = FeatureStore.create(memory, SETTINGS)
    records = [make_record("a1", 1, 9), make_record("b2", 70, 33)]
    store.commit([write_part(memory, records, SETTINGS).part_id], job_id="1")
    store.commit([write_part(memory, [make_record("c3", 4, 7)], SETTINGS).part_id], job_id="2")
    versions.set_tag(memory, "both")
    store.delete(["a1"])
    compact(memory)
    collect_garbage(memory, grace_s=0)
    assert verify(memory, level="deep").problems == ()
    assert FeatureStore.open(memory).ids == ["b2", "c3"]
    assert FeatureStore.open(memory, "both").ids == ["a1", "b2", "c3"]
    copy_store(memory, tmp_path / "c")
    np.testing.assert_array_equal(FeatureStore.open(tmp_path / "c")["b2"].msa(), records[1].msa)


class LookThenWrite(MemoryFileSystem):
    """A kind of storage that is unknown here; it may look for a name and then write it, as many do."""

    protocol = "lookthenwrite"

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("lookthenwrite://", "memory://"))


def test_a_storage_that_is_not_known_to_create_exclusively_is_read_only(memory):
    fsspec.register_implementation("lookthenwrite", LookThenWrite, clobber=True)
    store = FeatureStore.create(memory, SETTINGS)
    store.commit([write_part(memory, [make_record("a1", 3, 9)], SETTINGS).part_id], job_id="1")
    url = memory.replace("memory", "lookthenwrite")
    there = FeatureStore.open(url)
    assert there.fingerprint == store.fingerprint
    for change in (
        lambda: FeatureStore.create(f"{url}-new"),
        lambda: there.delete(["a1"]),
        lambda: versions.set_tag(url, "t"),
    ):
        with pytest.raises(StorageRefusedError, match="two commits at once could lose one"):
            change()
    assert FeatureStore.open(memory).version == 1


def test_an_index_that_cannot_be_made_anew_stays_where_it_is(memory):
    """Else the store would have none at all."""
    fsspec.register_implementation("lookthenwrite", LookThenWrite, clobber=True)
    store = FeatureStore.create(memory, SETTINGS)
    store.commit([write_part(memory, [make_record("a1", 3, 9)], SETTINGS).part_id], job_id="1")
    blobs, fingerprint = open_blobs(memory), store.fingerprint
    blobs.write_atomic("index/_delta_log/00000000000000000001.json", b"")
    before = [file.path for file in blobs.walk("")]
    with pytest.raises(StorageRefusedError, match="two commits at once could lose one"):
        repair(memory.replace("memory", "lookthenwrite"), rebuild_lost_index=True)
    assert [file.path for file in blobs.walk("")] == before
    # Where it can be made, it is.
    assert repair(memory, rebuild_lost_index=True).after.problems == ()
    assert FeatureStore.open(memory).fingerprint == fingerprint
    assert not [name for name in blobs.list("") if name.startswith(".tmp-")]


def test_a_log_with_a_gap_is_damage_and_not_an_older_store(memory):
    store = FeatureStore.create(memory, SETTINGS)
    for number in range(3):
        part = write_part(memory, [make_record(f"r{number}", 2, 5)], SETTINGS)
        store.commit([part.part_id], job_id=str(number))
    open_blobs(memory).delete("index/_delta_log/00000000000000000002.json")
    with pytest.raises(CorruptDataError, match=r"00000000000000000002\.json: the file is missing"):
        FeatureStore.open(memory)


@pytest.fixture
def aws(monkeypatch):
    """A function that sets S3's variables, and nothing else of AWS."""
    names = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "ENDPOINT_URL", "ENDPOINT_URL_S3")
    for name in (*names, "REGION", "DEFAULT_REGION", "SKIP_SIGNATURE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)

    def given(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"AWS_{name}", value)

    return given


def test_both_clients_of_s3_are_told_the_same(aws):
    aws(ACCESS_KEY_ID="k", SECRET_ACCESS_KEY="s", SESSION_TOKEN="t", DEFAULT_REGION="eu-1")
    aws(ENDPOINT_URL="https://other", ENDPOINT_URL_S3="http://127.0.0.1:1")
    files, delta = fsspec_options("s3://b/x"), delta_options("s3://b/x")
    assert (files["key"], files["secret"], files["token"]) == ("k", "s", "t")
    assert files["endpoint_url"] == delta["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
    assert files["client_kwargs"]["region_name"] == delta["AWS_REGION"] == "eu-1"
    assert [delta[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")] == [
        "k",
        "s",
        "t",
    ]
    assert (delta["AWS_ALLOW_HTTP"], delta["aws_conditional_put"]) == ("true", "etag")
    assert files["config_kwargs"]["retries"] == {"total_max_attempts": 1}
    aws(ENDPOINT_URL_S3="https://s3.example.org", SKIP_SIGNATURE="true")
    assert "AWS_ALLOW_HTTP" not in delta_options("s3://b/x")
    assert fsspec_options("s3://b/x")["anon"] is True


def test_half_of_the_credentials_is_refused(aws):
    aws(ACCESS_KEY_ID="k")
    for options in (fsspec_options, delta_options):
        with pytest.raises(StoreUrlError, match="only one is set"):
            options("s3://b/x")


@pytest.mark.parametrize("url", ["gs://b/x", "/a/b", "memory://x", "https://h/x"])
def test_other_storages_get_nothing_of_s3(aws, url):
    aws(ACCESS_KEY_ID="k", SECRET_ACCESS_KEY="s", ENDPOINT_URL="http://127.0.0.1:1")
    assert delta_options(url) == {}
    assert fsspec_options(url) == {"skip_instance_cache": True, "use_listings_cache": False}


@pytest.fixture
def no_pause(monkeypatch) -> list[float]:
    """The pauses that would have been made."""
    pauses: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("attempts", [1, 2, 7])
def test_attempts_are_bounded_and_pauses_grow_to_a_limit(no_pause, monkeypatch, attempts):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", str(attempts))
    calls = []

    def fail():
        calls.append(1)
        raise ConnectionResetError("gone")

    with pytest.raises(StorageError, match="gone") as caught:
        retrying(fail, "read", "s3://b/x")
    assert len(calls) == caught.value.attempts == attempts
    assert len(no_pause) == attempts - 1
    longest = [min(5.0, 0.1 * 2**n) for n in range(attempts - 1)]
    assert all(high / 2 <= pause <= high for pause, high in zip(no_pause, longest, strict=True))
    assert isinstance(caught.value.__cause__, ConnectionResetError)


@pytest.mark.parametrize(
    "answer",
    [FileNotFoundError("x"), FileExistsError("x"), ValueError("a fault of the program"), KeyError("x")],
)
def test_answers_and_faults_of_the_program_are_not_repeated(no_pause, answer):
    calls = []

    def call():
        calls.append(1)
        raise answer

    with pytest.raises(type(answer)):
        retrying(call, "read", "s3://b/x")
    assert (len(calls), no_pause) == (1, [])


def test_an_impossible_policy_is_refused(monkeypatch):
    for values in ({"attempts": 0}, {"timeout_s": 0.0}, {"first_pause_s": 9.0}, {"first_pause_s": -1.0}):
        with pytest.raises(ValueError, match="FOLDFEED_STORAGE_"):
            dataclasses.replace(RetryPolicy(), **values)
    for name in ("ATTEMPTS", "TIMEOUT_S", "PAUSE_S"):
        for text in ("many", "nan", "inf", "-1"):
            with monkeypatch.context() as patch:
                patch.setenv(f"FOLDFEED_STORAGE_{name}", text)
                with pytest.raises(ValueError, match=rf"FOLDFEED_STORAGE_{name}\b") as caught:
                    retries.retry_policy()
                assert text in str(caught.value)


class ParamValidationError(Exception):
    """As botocore's, which is an extra."""

    __module__ = "botocore.exceptions"


def answered(code: str, status: int) -> OSError:
    """What s3fs makes of an answer of S3."""
    error, cause = OSError(errno.EINVAL, code), Exception()
    cause.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = cause
    return error


def test_a_body_that_was_cut_is_sent_again(no_pause, monkeypatch):
    """s3fs calls it an invalid argument."""
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "3")
    answers = [answered("IncompleteBody", 400), answered("BadDigest", 400)]

    def call():
        if answers:
            raise answers.pop()
        return "done"

    assert retrying(call, "write", "s3://b/x") == "done"


@pytest.mark.skipif(find_spec("s3fs") is None, reason="s3fs (extra s3) is not installed")
def test_a_server_that_cannot_list_unfinished_uploads_has_none_that_are_known(aws):
    status, code = 501, "NotImplemented"

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 30

        def log_message(self, *args):
            pass

        def do_GET(self):
            body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        aws(ACCESS_KEY_ID="k", SECRET_ACCESS_KEY="s", DEFAULT_REGION="eu-1")
        aws(ENDPOINT_URL=f"http://127.0.0.1:{server.server_address[1]}")
        blobs = open_blobs("s3://b/x")
        assert blobs.unfinished_uploads() == ()
        status, code = 403, "AccessDenied"
        with pytest.raises(StorageError, match="AccessDenied"):
            blobs.unfinished_uploads()
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.mark.parametrize(
    "error",
    [
        ParamValidationError("Invalid bucket name"),
        OSError(errno.EINVAL, "Invalid argument"),
        ssl.SSLCertVerificationError(1, "certificate verify failed"),
        answered("NotImplemented", 501),
        answered("InvalidBucketName", 400),
        PermissionError("denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_no_attempt_can_mend_is_said_at_once(no_pause, error):
    calls = []

    def call():
        calls.append(1)
        raise error

    with pytest.raises(StorageError, match="failed once"):
        retrying(call, "read", "s3://b/x")
    assert (len(calls), no_pause) == (1, [])


def test_a_short_read_is_asked_for_again_and_never_used(memory, no_pause, monkeypatch):
    """Half of the answers are cut; at the end of the file fewer bytes are right."""
    blobs = open_blobs(memory)
    data = bytes(range(200))
    blobs.write_atomic("x", data)
    original = MemoryFileSystem.cat_file
    rng = np.random.default_rng(4)

    def cut(self, path, start=None, end=None, **kwargs):
        found = original(self, path, start=start, end=end, **kwargs)
        return found[: rng.integers(0, len(found))] if len(found) and rng.random() < 0.4 else found

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cut)
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "40")
    for start in (0, 7, 190, 199, 200):
        for size in (1, 20, 300):
            assert blobs.read_range("x", start, size) == data[start : start + size]
    assert blobs.read("x") == data
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **kwargs: b"xy")
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "3")
    with pytest.raises(StorageError, match="2 bytes came instead of 20 from 7 on in a file of 200"):
        blobs.read_range("x", 7, 20)


@pytest.mark.parametrize(
    "error",
    [
        StorageError("s3://b/x", "read", 3, "gone"),
        StorageRefusedError("http://h/x", "write", "read only"),
        StorageFullError("/x"),
        MissingExtraError("s3fs", "s3"),
    ],
)
def test_errors_travel_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


class HostMemory(MemoryFileSystem):
    """A client that needs to know its host, as those of ftp:// and sftp:// do."""

    protocol = "hostmemory"

    def __init__(self, host, **options):
        super().__init__(**options)
        self.store, self.pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).partition("://")[2].partition("/")[2].strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path):
        host = path.partition("://")[2].partition("/")[0]
        return {"host": host} if host else {}


def test_a_host_in_the_url_reaches_the_client_and_tells_places_apart():
    fsspec.register_implementation("hostmemory", HostMemory, clobber=True)
    here, there = open_blobs("hostmemory://here/x"), open_blobs("hostmemory://there/x")
    here.write_atomic("file", b"of here")
    assert open_blobs("hostmemory://here/x").read("file") == b"of here"
    with pytest.raises(FileNotFoundError):
        there.read("file")
    with pytest.raises(StoreUrlError, match=r"its client says: .*host"):
        open_blobs("hostmemory:///x")


# fsspec's own: its client cleans up after a connection that it never had.
@pytest.mark.filterwarnings("ignore:.*FTPFileSystem.__del__:pytest.PytestUnraisableExceptionWarning")
def test_a_client_that_cannot_connect_says_so_without_the_password():
    """Nobody listens on port 1."""
    with pytest.raises(StorageError, match=r"connect to 'ftp://\*+@127\.0\.0\.1:1/x' failed once") as caught:
        FeatureStore.open("ftp://user:s3cret@127.0.0.1:1/x")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(StoreUrlError, match="host"):
        FeatureStore.open("ftp:///x")


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@127.0.0.1:1/st",
        "https://s3cret@127.0.0.1:1",
        "http://127.0.0.1:1/st?X-Amz-Signature=s3cret",
        "http://127.0.0.1:1?s3cret",
        "s3://key:s3cret@bucket/st",
        "gs://s3cret@bucket/st",
    ],
)
def test_secrets_in_a_url_are_refused_and_not_shown(url):
    with pytest.raises(StoreUrlError) as caught:
        FeatureStore.open(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.url.startswith(url.partition("://")[0])
    assert "***" in caught.value.url
