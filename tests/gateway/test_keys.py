"""API keys over HTTP and gRPC: who is served, how much, and that a key is seen nowhere."""

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from click.testing import CliRunner

from hexgen2 import metrics
from hexgen2.cli.main import main
from hexgen2.errors import ConfigError, LimitExceeded, PermissionDenied, Unauthenticated
from hexgen2.gateway.keys import Account, Keys
from hexgen2.security.api_keys import ApiKey, add_key, fingerprint, read_keys, remove_key
from hexgen2.v1 import gateway_pb2
from tests.certificates import Authority
from tests.eventually import eventually
from tests.gateway.asking import BODY, PATH
from tests.gateway.house import House, house
from tests.gateway.test_gateway_process import gateway, http_address


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def post(made: House, key: str | None = None, **body: Any) -> httpx.Response:
    return await made.http.post(PATH, json=BODY | body, headers=bearer(key) if key else {})


async def generate(made: House, key: str | None = None, prompt: str = "x") -> str:
    """The status of one call over gRPC."""
    metadata = tuple(bearer(key).items()) if key else ()
    try:
        async for _ in made.stub.Generate(gateway_pb2.GenerateRequest(prompt=prompt), metadata=metadata, timeout=20):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def replace(file: Path, text: str) -> str:
    """What was there."""
    before = file.read_text()
    file.write_text(text)
    return before


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def spans_in(home: Path) -> str:
    return "".join(path.read_text() for path in home.rglob("*.jsonl"))


def refused(error: str) -> float:
    return float(metrics.REQUESTS_FAILED.labels(error)._value.get())


def counted(key: str, outcome: str) -> float:
    return float(metrics.API_REQUESTS.labels(key, outcome)._value.get())


async def test_only_who_shows_a_key_is_served(folder: Path, file: Path) -> None:
    key = add_key(file, "alice")
    async with house(folder, api_keys=file) as made:
        made.answers("abc")
        before = counted("", "no_key"), counted("", "wrong_key"), counted("alice", "admitted")
        for wrong in (None, "hx_wrong", key + "x", fingerprint(key)):
            refused = await post(made, wrong)
            error = refused.json()["error"]
            assert (refused.status_code, error["type"], error["code"]) == (
                401,
                "authentication_error",
                "invalid_api_key",
            )
            assert refused.headers["www-authenticate"] == "Bearer"
            assert await generate(made, wrong) == "UNAUTHENTICATED"
        assert not made.prefills[0].calls
        assert (await post(made, key)).status_code == 200
        assert await generate(made, key) == "OK"
        after = counted("", "no_key"), counted("", "wrong_key"), counted("alice", "admitted")
        assert tuple(now - then for now, then in zip(after, before, strict=True)) == (2, 6, 2)


async def test_health_is_everybodys_and_the_rest_is_not(folder: Path, file: Path) -> None:
    key = add_key(file, "alice")
    async with house(folder, api_keys=file) as made:
        paths = ("/health", "/metrics", "/v1/models", "/v1/models/tiny")
        assert [(await made.http.get(path)).status_code for path in paths] == [200, 401, 401, 401]
        assert [(await made.http.get(path, headers=bearer(key))).status_code for path in paths] == [200] * 4


async def test_a_key_over_its_rate_waits_and_others_do_not(folder: Path, file: Path) -> None:
    slow, fast = add_key(file, "slow", requests_per_minute=2), add_key(file, "fast")
    async with house(folder, api_keys=file) as made:
        made.answers("abc")
        assert [(await post(made, slow)).status_code for _ in range(2)] == [200, 200]
        refused = await post(made, slow)
        assert refused.status_code == 429
        assert 20 <= int(refused.headers["retry-after"]) <= 30
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert await generate(made, slow) == "RESOURCE_EXHAUSTED"
        assert (await post(made, fast)).status_code == 200
        assert await generate(made, fast) == "OK"


async def test_a_key_with_too_many_at_once_waits_and_others_do_not(folder: Path, file: Path) -> None:
    one, many = add_key(file, "one", max_concurrent_requests=1), add_key(file, "many")
    async with house(folder, api_keys=file) as made:
        held = asyncio.create_task(post(made, one))
        await made.prefills[0].first_call()
        assert (await post(made, one)).status_code == 429
        held.cancel()
        await asyncio.wait((held,))
        await eventually(lambda: made.gateway.num_running == 0)
        made.answers("abc")
        assert [(await post(made, key)).status_code for key in (many, one, many, one)] == [200] * 4


async def test_a_key_has_its_own_limit_of_size(folder: Path, file: Path) -> None:
    small, large = add_key(file, "small", max_body_bytes=100), add_key(file, "large")
    async with house(folder, api_keys=file) as made:
        made.answers("abc")
        before = refused("BodyTooLarge"), refused("InvalidRequest")
        long = "x" * 60
        assert (await post(made, small, prompt=long, user="u" * 100)).status_code == 413
        assert (await post(made, large, prompt="x", user="u" * 100)).status_code == 200
        assert (await post(made, small)).status_code == 200
        assert await generate(made, small, "x" * 101) == "INVALID_ARGUMENT"
        assert await generate(made, small) == "OK"
        # Counted, whichever way it came.
        assert sum((refused("BodyTooLarge"), refused("InvalidRequest"))) == sum(before) + 2


async def test_changes_of_the_file_count_at_once(folder: Path, file: Path) -> None:
    old = add_key(file, "old")
    async with house(folder, api_keys=file) as made:
        made.answers("abc")
        assert (await post(made, old)).status_code == 200
        new = add_key(file, "new")
        assert [(await post(made, key)).status_code for key in (old, new)] == [200, 200]
        remove_key(file, "old")
        assert [(await post(made, key)).status_code for key in (old, new)] == [401, 200]
        # A file that cannot be read lets nobody in who was not, and shuts nobody out.
        good = replace(file, "keys: [")
        assert [(await post(made, key)).status_code for key in (old, new)] == [401, 200]
        replace(file, good + "  disabled: true\n")
        refused = await post(made, new)
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert await generate(made, new) == "PERMISSION_DENIED"


async def test_keys_and_tls_without_client_certificates(folder: Path, tmp_path: Path, authority: Authority) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, "alice")
    flags = ("--tls", str(authority.folder / "gateway"), "--api-keys", str(file))
    async with gateway(folder, tmp_path, *flags) as process:
        address = await http_address(process)
        ca = authority.config("client").ca

        context = ssl.create_default_context(cafile=str(ca))
        async with httpx.AsyncClient(base_url=f"https://{address}", verify=context, trust_env=False) as http:
            assert (await http.get("/v1/models")).status_code == 401
            assert (await http.get("/v1/models", headers=bearer(key))).status_code == 200
            refused = await http.post(PATH, json=BODY, headers=bearer(key))
            assert refused.status_code == 503
            assert (await http.post(PATH, json=BODY, headers=bearer("hx_secret"))).status_code == 401
        command = command_line(process.pid)
        process.terminate()
        assert process.stderr is not None
        log = (await process.stderr.read()).decode()
        assert await process.wait() == 0
    spans = spans_in(tmp_path)
    assert '"alice"' in spans
    for secret in (key, "hx_secret"):
        assert secret not in log
        assert secret not in spans
        assert secret not in command


async def test_a_file_that_is_not_there_is_said_at_the_start(folder: Path, tmp_path: Path) -> None:
    async with gateway(folder, tmp_path, "--api-keys", str(tmp_path / "none.yaml")) as process:
        assert process.stderr is not None
        assert "none.yaml: No such file" in (await process.stderr.read()).decode()
        assert await process.wait() == 2


def test_allowance_grows_back_over_a_minute() -> None:
    key, account = ApiKey(name="a", sha256="0" * 64, requests_per_minute=60), Account()
    for _ in range(60):
        account.take(key, 100.0)
    with pytest.raises(LimitExceeded) as refused:
        account.take(key, 100.0)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    account.take(key, 101.0)
    with pytest.raises(LimitExceeded):
        account.take(key, 101.5)
    # Never more than a minute's worth, however long nobody asked.
    for _ in range(60):
        account.take(key, 10_000.0)
    with pytest.raises(LimitExceeded):
        account.take(key, 10_000.0)


def test_headers_that_are_no_key(file: Path) -> None:
    key = add_key(file, "a")
    keys = Keys(file)
    for wrong in (None, "", "Bearer", "Bearer ", key, f"Basic {key}", f"Bearer {key} x", "Bearer \udcff"):
        with pytest.raises(Unauthenticated):
            keys.check(wrong)
    for right in (f"Bearer {key}", f"bearer  {key} "):
        checked = keys.check(right)
        assert checked is not None
        assert checked.name == "a"
    file.write_text(file.read_text() + "  disabled: true\n")
    with pytest.raises(PermissionDenied):
        keys.check(f"Bearer {key}")


def test_the_file_has_no_key_and_is_its_owners(file: Path) -> None:
    key = add_key(file, "a", requests_per_minute=5)
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_keys(file) == (ApiKey(name="a", sha256=fingerprint(key), requests_per_minute=5),)


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("a", {}, "keys: name a is there twice|key: name a is there twice"),
        ("a b", {}, "name: 'a b'"),
        ("", {}, "name: ''"),
        ("b", {"requests_per_minute": 0}, "requests_per_minute: 0 should be greater"),
        ("b", {"max_body_bytes": -1}, "max_body_bytes: -1 should be greater"),
    ],
)
def test_what_cannot_be_a_key_is_refused(name: str, limits: dict[str, int], message: str, file: Path) -> None:
    add_key(file, "a")
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=message):
        add_key(file, name, **limits)
    assert file.read_bytes() == before


def test_the_commands(file: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["keys", *arguments, "--file", str(file)])
        assert result.exit_code == 0, result.output
        return result.output

    key = run("add", "alice", "--requests-per-minute", "60").strip()
    other = json.loads(run("add", "bob", "--json"))["key"]
    assert Keys(file).check(f"Bearer {key}") is not None
    shown = run("list")
    assert "alice" in shown
    assert "60" in shown
    assert key not in shown
    run("remove", "alice")
    assert [each["name"] for each in json.loads(run("list", "--json"))] == ["bob"]
    with pytest.raises(Unauthenticated):
        Keys(file).check(f"Bearer {key}")
    assert Keys(file).check(f"Bearer {other}") is not None
    missing = CliRunner().invoke(main, ["keys", "remove", "alice", "--file", str(file)])
    assert (missing.exit_code, "there is no key of the name 'alice'" in missing.output) == (1, True)
