"""The objects tier over the network: with a real S3 server in a separate process, and with one that gives bad answers."""

import uuid
from collections.abc import Iterator
from threading import Thread

import pytest

from tests.unit.tiers.records import ROOT, assert_holds, key_of, put, record_of
from tests.unit.tiers.s3 import BadServer, Server, environment, served, start_server
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.log import Refusal
from tiered_kv.tiers.objects.open_store import open_store
from tiered_kv.tiers.objects.packs import read_frame
from tiered_kv.tiers.objects.tier import ObjectsTier

pytest.importorskip("obstore")
pytest.importorskip("moto")

CAP = 1 << 20
FRAME = 50_000


@pytest.fixture(scope="module", autouse=True)
def credentials():
    """Credentials in the usual environment variables."""
    with environment(ACCESS_KEY_ID="test", SECRET_ACCESS_KEY="test", REGION="us-east-1", ALLOW_HTTP="true") as patch:
        yield patch


@pytest.fixture(scope="module")
def server(credentials) -> Iterator[Server]:
    with served(credentials) as server:
        yield server


@pytest.fixture(autouse=True)
def no_leaked_files():
    """Connections of a closed store end a moment later: what is left is counted by the fixture of all tests, which waits."""


@pytest.fixture
def s3(server):
    """A store under a separate prefix."""
    with open_store("s3://bucket/caches", uuid.uuid4().hex, read_deadline_s=4, write_deadline_s=8) as store:
        yield store


def error_of(call, *arguments) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    return caught.value


def test_objects_are_put_read_and_deleted(s3):
    s3.put("one", [b"abc", b"def"])
    assert bytes(s3.get("one")) == b"abcdef"
    assert bytes(s3.get_range("one", 2, 3)) == b"cde"
    assert s3.sizes() == {"one": 6}
    assert error_of(s3.get_range, "one", 4, 9).kind is Kind.CORRUPT
    s3.delete(["one", "gone"])
    assert s3.sizes() == {}
    assert error_of(s3.get, "one").context["missing"]


def test_a_prefix_lists_only_its_own_objects(s3):
    s3.put("one", [b"1"])
    deeper = s3.url.removeprefix("s3://bucket/")
    with open_store(f"s3://bucket/{deeper}", "deeper") as other, open_store("s3://bucket/caches") as above:
        other.put("two", [b"22"])
        assert (s3.sizes(), other.sizes(), above.sizes()) == ({"one": 1}, {"two": 2}, {})


def test_blocks_survive_a_restart_and_respect_the_cap(server, s3, checked):
    prefix = s3.url.removeprefix("s3://bucket/")
    first = checked(ObjectsTier(s3, CAP))
    assert first.recovered() == []
    placed = put(first, range(30), FRAME)
    assert len(placed) == 20
    assert len(s3.sizes()) == 10
    assert first.used_bytes == sum(s3.sizes().values()) <= CAP
    first.reclaim(placed.pop(0).segment)
    del placed[1]
    first.close(remove=False)
    again = checked(ObjectsTier(open_store(f"s3://bucket/{prefix}"), CAP))
    assert [block.location for block in again.recovered()] == list(placed.values())
    for number, location in placed.items():
        assert_holds(again, number, location)


def test_a_flipped_byte_on_the_server_is_a_miss_for_that_block(s3, checked):
    tier = checked(ObjectsTier(s3, CAP))
    placed = put(tier, [1, 2], FRAME)
    (name,) = s3.sizes()
    whole = bytearray(s3.get(name))
    whole[placed[1].offset + 1000] ^= 1
    s3.put(name, [whole])
    assert error_of(tier.read, placed[1], key_of(1), ROOT).kind is Kind.CORRUPT
    assert_holds(tier, 2, placed[2])


def test_a_truncated_object_is_a_miss(s3):
    with ObjectsTier(s3, CAP) as tier:
        location = put(tier, [1], FRAME)[1]
        (name,) = s3.sizes()
        s3.put(name, [s3.get(name)[:1000]])
        assert error_of(tier.read, location, key_of(1), ROOT).kind is Kind.CORRUPT


def test_a_missing_bucket_is_an_error_and_stores_nothing(server, caplog):
    with ObjectsTier(open_store("s3://nowhere/prefix", write_deadline_s=4), CAP) as tier:
        error = error_of(tier.recovered)
        assert (error.kind, error.context["setting"]) == (Kind.STORAGE, "objects")
        assert str(error).endswith("404 Not Found (NoSuchBucket)")
        assert [answer.refused for answer in tier.append([record_of(1, FRAME)])] == [Refusal.IO_ERROR]
        assert "s3://nowhere/prefix" in caplog.text


def test_a_server_killed_midway_causes_only_misses_and_refusals(credentials, server):
    doomed = start_server()
    credentials.setenv("AWS_ENDPOINT_URL", doomed.url)
    store = open_store("s3://bucket/doomed", read_deadline_s=1, write_deadline_s=1)
    credentials.setenv("AWS_ENDPOINT_URL", server.url)
    try:
        with ObjectsTier(store, CAP) as tier:
            assert tier.recovered() == []
            location = put(tier, [1], FRAME)[1]
            assert_holds(tier, 1, location)
            doomed.stop()
            assert [answer.refused for answer in tier.append([record_of(2, FRAME)])] == [Refusal.IO_ERROR]
            assert error_of(tier.read, location, key_of(1), ROOT).kind is Kind.STORAGE
            assert tier.keys_in(location.segment) == [key_of(1)]
            assert tier.needs_reclaim(CAP) is None
    finally:
        doomed.stop()


@pytest.fixture
def bad(server, credentials):
    """A function that returns a store whose server gives the bad answer."""
    running = []

    def start(*answer, deadline_s: float = 1.0):
        httpd = BadServer(*answer)
        thread = Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        credentials.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{httpd.server_address[1]}")
        store = open_store("s3://bucket/bad", read_deadline_s=deadline_s, write_deadline_s=deadline_s)
        credentials.setenv("AWS_ENDPOINT_URL", server.url)
        running.append((httpd, thread, store))
        return httpd, store

    yield start
    for httpd, thread, store in running:
        store.close()
        httpd.answers.set()
        httpd.shutdown()
        thread.join()
        httpd.server_close()


FORBIDDEN = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@pytest.mark.parametrize(("status", "retried"), [(503, True), (500, True), (403, False)])
def test_server_errors_are_reported_and_retried_if_that_can_help(bad, status, retried):
    httpd, store = bad(status, FORBIDDEN)
    for call, *arguments in ((store.put, "one", [b"1"]), (store.get_range, "one", 0, 1), (store.sizes,), (store.delete, ["one"])):
        before = httpd.requests
        error = error_of(call, *arguments)
        assert (error.kind, error.context["setting"]) == (Kind.STORAGE, "objects")
        assert (httpd.requests - before > 1) is retried
        assert httpd.requests - before <= 5, "retries are bounded"


def test_a_body_that_ends_early_is_never_used_as_the_block(bad):
    _, store = bad(206, b"half", 64)
    assert error_of(store.get_range, "one", 0, 64).kind is Kind.STORAGE


def test_a_server_that_never_answers_is_a_miss_within_the_deadline(bad):
    httpd, store = bad(200)
    httpd.answers.clear()
    assert error_of(read_frame, store, "one.pack", 0, FRAME, key_of(1)).kind is Kind.STORAGE
    with ObjectsTier(store, CAP) as tier:
        assert [answer.refused for answer in tier.append([record_of(1, FRAME)])] == [Refusal.IO_ERROR]
