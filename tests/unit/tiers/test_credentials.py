"""The choice of a store's credentials, which no message ever shows."""

import json
import os
import pickle
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest

from tests.unit.tiers.s3 import BadServer, Fault, Proxy, Server
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects import remote_store as remotestore
from tiered_kv.tiers.objects.credentials import _KINDS, _OPTIONS, access, credentials
from tiered_kv.tiers.objects.open_store import open_store

pytest.importorskip("obstore")

URL = "s3://bucket/prefix"
SECRET = "secret-of-a-test"
FORBIDDEN = Fault(403, "AccessDenied")


@pytest.fixture(scope="module", autouse=True)
def what_the_library_keeps_open():
    """Open the library's files, which it opens at the first request, before the test counts open files."""
    given = {"AWS_ACCESS_KEY_ID": "of-nobody", "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ALLOW_HTTP": "true"}
    with open_store(URL, environ=given, write_deadline_s=0.1) as store:
        error_of(store.sizes)


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """An environment without any credentials."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(autouse=True)
def no_leaked_files():
    """Connections of a closed store end a moment later: what is left is counted by the fixture of all tests, which waits."""


@pytest.fixture
def proxy():
    """A proxy that rejects all requests, and records their keys."""
    running = Proxy(Server(None, "http://127.0.0.1:9"))
    running.spoil = lambda _: FORBIDDEN
    yield running
    running.stop()


def files_of_aws(home: Path, keys: str = "", config: str = "") -> None:
    (home / ".aws").mkdir()
    (home / ".aws/credentials").write_text(keys)
    (home / ".aws/config").write_text(config)


def error_of(call, *arguments) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    return caught.value


def whom(proxy: Proxy, environ=None) -> str:
    """Returns the key that signs a store's request, with the credentials of this process's environment or with given ones."""
    proxy.keys.clear()
    with open_store(URL, setting="url", environ=environ) as store:
        message = str(error_of(store.sizes))
    assert message.startswith("checkpoint: s3://bucket/prefix list: ")
    assert "AccessDenied" in message
    assert SECRET not in message
    (key,) = proxy.keys
    return key


PROFILES = f"""
[default]
aws_access_key_id = of-default
aws_secret_access_key = {SECRET}
[work]
aws_access_key_id = of-work
aws_secret_access_key = {SECRET}%
aws_session_token = token
"""


@pytest.mark.parametrize("boto3", [True, False])
@pytest.mark.parametrize(("variables", "key"), [({}, "of-default"), ({"AWS_PROFILE": "work"}, "of-work")])
def test_a_profile_gives_the_credentials_if_no_variable_does(proxy, tmp_path, monkeypatch, boto3, variables, key) -> None:
    if boto3:
        pytest.importorskip("boto3")
    else:
        monkeypatch.setitem(sys.modules, "obstore.auth.boto3", None)
    files_of_aws(tmp_path, PROFILES, f"[default]\nregion = eu-north-1\n[profile work]\nendpoint_url = {proxy.url}\n")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not variables:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    assert whom(proxy) == key
    given = credentials(URL)
    assert given["AWS_ACCESS_KEY_ID"] == key
    assert given.get("AWS_REGION") == (None if variables else "eu-north-1")
    assert given["AWS_ENDPOINT_URL"] == proxy.url
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-variables")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    assert whom(proxy) == "of-variables"


def test_profiles_are_read_from_the_files_that_variables_name(proxy, tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").write_text(PROFILES)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "elsewhere"))
    assert credentials(URL)["AWS_ACCESS_KEY_ID"] == "of-default"
    assert credentials(URL, {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "elsewhere"), "AWS_PROFILE": "work"}) == {
        "AWS_ACCESS_KEY_ID": "of-work",
        "AWS_SECRET_ACCESS_KEY": f"{SECRET}%",
        "AWS_SESSION_TOKEN": "token",
    }


def test_a_missing_profile_is_an_error(tmp_path, monkeypatch) -> None:
    files_of_aws(tmp_path, PROFILES)
    monkeypatch.setenv("AWS_PROFILE", "none")
    for call in (lambda: open_store(URL), lambda: credentials(URL)):
        error = error_of(call)
        assert error.kind is Kind.CONFIG
        assert "'none'" in str(error)


def test_a_damaged_file_or_a_profile_without_keys_gives_no_credentials(tmp_path) -> None:
    files_of_aws(tmp_path, "aws_access_key_id without a section", "[default]\nregion = eu-north-1\n")
    assert access(URL).is_machines
    assert credentials(URL) == {}


def test_keys_of_a_process_are_renewed_before_they_end(proxy, tmp_path, monkeypatch) -> None:
    """boto3 renews keys that expire in less than ten minutes, so the keys that it returns are not used for longer."""
    pytest.importorskip("boto3")
    ends = datetime.now(UTC) + timedelta(minutes=16)
    keys = {"Version": 1, "AccessKeyId": "of-a-process", "SecretAccessKey": SECRET, "SessionToken": "token", "Expiration": ends.isoformat()}
    (tmp_path / "keys").write_text(json.dumps(keys))
    files_of_aws(tmp_path, "", f"[default]\ncredential_process = cat {tmp_path}/keys\nregion = eu-north-1\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    assert whom(proxy) == "of-a-process"
    assert credentials(URL)["AWS_SESSION_TOKEN"] == "token"
    assert access(URL).provider()["expires_at"] < ends - timedelta(minutes=5)


def test_a_role_in_a_profile_needs_boto3(tmp_path, monkeypatch) -> None:
    files_of_aws(tmp_path, "", "[default]\nsso_session = mine\n")
    monkeypatch.setitem(sys.modules, "obstore.auth.boto3", None)
    assert "install boto3" in str(error_of(open_store, URL))


def test_given_credentials_are_used_instead_of_ones_own(proxy, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-node")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-the-node")
    given = credentials(URL, {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": proxy.url, "HOME": "/"})
    assert "HOME" not in given
    assert whom(proxy, {**given, "AWS_ALLOW_HTTP": "true"}) == "mine"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert whom(proxy, {**given, "AWS_ALLOW_HTTP": "true"}) == "mine"
    assert credentials(URL, {"AWS_ENDPOINT_URL_S3": "http://a", "AWS_ENDPOINT_URL": "http://b"}) == {"AWS_ENDPOINT_URL": "http://a"}
    config = access(URL, {"AWS_ACCESS_KEY_ID": "mine", "AWS_REGION": "eu-north-1"}).config
    assert config["aws_endpoint_url"] == "https://s3.eu-north-1.amazonaws.com", "the endpoint of the node is not that of who asks"


def test_without_a_given_key_the_nodes_own_identity_is_used(proxy, monkeypatch, tmp_path) -> None:
    files_of_aws(tmp_path, PROFILES)
    asked = {"AWS_ENDPOINT_URL": proxy.url, "AWS_ALLOW_HTTP": "true"}
    assert whom(proxy, asked) == "of-default"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-node")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert whom(proxy, asked) == "of-the-node"


def test_a_server_that_cannot_be_replaced_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    mine = {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": SECRET}
    assert "AWS_ENDPOINT_URL_S3" in str(error_of(access, URL, mine))
    assert access(URL, {**mine, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).provider


@pytest.mark.parametrize("url", [URL, "gs://bucket/prefix", "az://container/prefix"])
def test_the_library_accepts_every_option_that_is_passed_on(url, tmp_path) -> None:
    (tmp_path / "key").write_text('{"type": "authorized_user", "client_id": "a", "client_secret": "b", "refresh_token": "c"}')
    kind = _KINDS[url.partition(":")[0]]
    for name in _OPTIONS[kind]:
        if name in ("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "AWS_S3_EXPRESS"):
            continue  # checked as it is opened
        value = "http://127.0.0.1:9" if name.endswith(("_ENDPOINT", "_HOST", "_URL")) else "true"
        value = "eA==" if name.endswith("_KEY") else "sig=eA==" if "_SAS_" in name else value
        value = {"AWS_CHECKSUM_ALGORITHM": "SHA256", "AWS_SERVER_SIDE_ENCRYPTION": "AES256"}.get(name, value)
        value = str(tmp_path / "key") if name == "GOOGLE_APPLICATION_CREDENTIALS" else value
        environ = {"AZURE_STORAGE_ACCOUNT_NAME": "account", name: value}
        open_store(url, environ=environ).close()


def test_credentials_show_only_their_names_and_are_used_only_for_their_kind_of_store() -> None:
    environ = {"AWS_ACCESS_KEY_ID": SECRET, "AWS_PROFILE": "", "GOOGLE_BEARER_TOKEN": SECRET, "AZURE_STORAGE_ACCOUNT_KEY": SECRET}
    of_s3, of_google, of_azure = (credentials(url, environ) for url in (URL, "gs://bucket", "az://container"))
    assert [list(each) for each in (of_s3, of_google, of_azure)] == [[name] for name in environ if environ[name]]
    assert SECRET not in f"{of_s3} {of_google!r} {[of_azure]}"
    assert pickle.loads(pickle.dumps(of_s3)) == of_s3
    for url in ("/folder", "file:///folder", "memory://"):
        assert credentials(url, environ) == {}


def test_a_service_accounts_key_is_sent_as_the_content_of_its_file(tmp_path) -> None:
    (tmp_path / "key").write_text('{"type": "service_account"}')
    (tmp_path / "user").write_text('{"type": "authorized_user"}')
    given = credentials("gs://bucket", {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key")})
    assert given == {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"type": "service_account"}'}
    for path in (tmp_path / "user", tmp_path / "gone"):
        by_path = {"GOOGLE_APPLICATION_CREDENTIALS": str(path)}
        assert credentials("gs://bucket", by_path) == by_path


@pytest.mark.parametrize(
    ("url", "named"),
    [(URL, "AWS_ACCESS_KEY_ID"), ("gs://bucket", "GOOGLE_APPLICATION_CREDENTIALS"), ("az://c", "AZURE_STORAGE_ACCOUNT_KEY")],
)
def test_without_credentials_the_error_names_the_variables_to_set(monkeypatch, url, named) -> None:
    monkeypatch.setattr(remotestore, "machine_answers", lambda: False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    with open_store(url, setting="url") as store:
        for call, *arguments in ((store.sizes,), (store.put, "one", [b"1"]), (store.get_range, "one", 0, 1)):
            message = str(error_of(call, *arguments))
            assert message.startswith(f"checkpoint: {url}")
            assert f"there are no credentials: set {named}" in message


def test_a_machine_without_a_metadata_service_causes_no_wait(monkeypatch) -> None:
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with open_store(URL) as store:
        assert "there are no credentials" in str(error_of(store.sizes))


def test_the_error_for_a_machine_without_a_role_differs_from_a_refusal(monkeypatch) -> None:
    httpd = BadServer(404, b"no role")
    thread = Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(remotestore, "METADATA", "127.0.0.1")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{httpd.server_address[1]}")
    try:
        with open_store(URL) as store:
            message = str(error_of(store.sizes))
        assert "there are no credentials: set AWS_ACCESS_KEY_ID" in message
        assert "404" in message
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
