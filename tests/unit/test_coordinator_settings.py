"""A coordinator's folder and settings, what its HTTP port answers, and its logs."""

from __future__ import annotations

import json
import logging
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from commonweight.coordinator import server
from commonweight.coordinator.folder import (
    certificate_ends,
    enroll,
    fingerprint,
    hosts_of,
    init,
    renew_server_certificate,
)
from commonweight.coordinator.metrics import Metrics
from commonweight.coordinator.server import JsonLines, keep_certificate, log_to_stderr, serve_http
from commonweight.coordinator.settings import FILE, CoordinatorSettings, checked_settings, load_settings, settings_text
from commonweight.coordinator.store import Store
from commonweight.errors import AccessError, CommonweightError, RecipeError, StateError, StorageError, UnreachableError
from commonweight.identity.certificates import verify_certificate


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coordinator") / "home"
    init(folder, CoordinatorSettings(), ["localhost", "127.0.0.1"])
    return folder


# --- settings


def test_settings_are_written_with_what_they_mean_and_read_back() -> None:
    settings = CoordinatorSettings(heartbeat_s=0.5, blobs="s3://bucket/prefix", blob_options={"key": "a: b"})
    text = settings_text(settings)
    assert CoordinatorSettings.model_validate(yaml.safe_load(text)) == settings
    for name, field in CoordinatorSettings.model_fields.items():
        assert f"# {field.description}\n{name}:" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("heartbeat_s: [", "is no YAML"),
        ("\x00", "is no YAML"),
        ("- a list", "file"),
        ("just words", "file"),
        ("heartbeat: 1", "heartbeat: Extra inputs"),
        ("heartbeat_s: fast", "heartbeat_s: "),
        ("heartbeat_s: 0", "heartbeat_s: "),
        ("heartbeat_s: .nan", "heartbeat_s: "),
        ("lease_s: .inf", "lease_s: "),
        ("name: Not A Name", "name: "),
        ("listen: nowhere", "listen: address 'nowhere' is not host:port"),
        ("listen: ':8443'", "listen: "),
        ("listen: 0.0.0.0:99999", "listen: "),
        ("listen: '::1:8443'", "listen: "),
        ("listen_http: 127.0.0.1:-1", "listen_http: "),
        ("transfers_at_once: 0", "transfers_at_once: "),
        ("max_upload_mb: 0.5", "max_upload_mb: "),
        ("certificate_hours: 0\ntoken_hours: 1.0e+9", "token_hours: "),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_settings(tmp_path)
    assert words in caught.value.message
    assert str(tmp_path / FILE) in caught.value.message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="no YAML"):
        load_settings(tmp_path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("")
    assert load_settings(tmp_path) == CoordinatorSettings() == checked_settings({}, "here")


def test_a_folder_that_is_no_coordinators(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no coordinator") as caught:
        load_settings(tmp_path)
    assert "coordinator init" in caught.value.hint


def test_paths_are_the_folders_own_unless_they_are_urls(tmp_path: Path) -> None:
    settings = CoordinatorSettings()
    assert settings.database_url(tmp_path) == f"sqlite:///{tmp_path}/state.sqlite"
    assert settings.blobs_url(tmp_path) == f"{tmp_path}/blobs"
    remote = CoordinatorSettings(database="postgresql://u@h/d", blobs="s3://bucket/x")
    assert remote.database_url(tmp_path) == "postgresql://u@h/d"
    assert remote.blobs_url(tmp_path) == "s3://bucket/x"


# --- the folder


def test_a_new_folder_is_its_owners_alone(home: Path) -> None:
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for secret in ("master.key", "server/tls.key", "server/signing.key", "state.sqlite"):
        assert stat.S_IMODE((home / secret).stat().st_mode) == 0o600, secret
    assert hosts_of(home) == ["localhost", "127.0.0.1"]
    assert len(bytes.fromhex(fingerprint(home))) == 32
    assert load_settings(home) == CoordinatorSettings()


def test_a_folder_is_made_once(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is a coordinator's already"):
        init(home, CoordinatorSettings(), [])
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StateError, match="not empty"):
        init(tmp_path, CoordinatorSettings(), [])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("values", "hosts", "kind"),
    [
        ({}, ["not a host"], AccessError),
        ({}, ["localhost", ""], AccessError),
        ({"database": "mysql://h/d"}, ["localhost"], RecipeError),
    ],
)
def test_what_cannot_be_made_leaves_nothing(
    tmp_path: Path, values: dict[str, Any], hosts: list[str], kind: type[CommonweightError]
) -> None:
    """So that the same command can be repeated once the mistake is mended."""
    folder = tmp_path / "home"
    with pytest.raises(kind):
        init(folder, CoordinatorSettings(**values), hosts)
    assert not folder.exists()
    init(folder, CoordinatorSettings(), ["localhost"])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        init(tmp_path / "file" / "home", CoordinatorSettings(), ["localhost"])
    with pytest.raises(StorageError):
        init(tmp_path / "file", CoordinatorSettings(), ["localhost"])


def test_the_coordinators_own_certificate_is_renewed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings = tmp_path / "home", CoordinatorSettings()
    monkeypatch.setattr("commonweight.coordinator.folder._SERVER_HOURS", 24.0)
    init(folder, settings, ["localhost"])
    before, key = (folder / "server" / "tls.pem").read_bytes(), (folder / "server" / "tls.key").read_bytes()
    monkeypatch.setattr("commonweight.coordinator.folder._SERVER_HOURS", 24.0 * 90)
    keep_certificate(folder, settings)
    after = (folder / "server" / "tls.pem").read_bytes()
    assert after != before
    assert (folder / "server" / "tls.key").read_bytes() == key
    assert certificate_ends(folder) > verify_certificate(before, _authority(folder)).not_after + 24 * 3600
    assert verify_certificate(after, _authority(folder)).role == "coordinator"
    keep_certificate(folder, settings)
    assert (folder / "server" / "tls.pem").read_bytes() == after
    renew_server_certificate(folder, settings, ["localhost"])
    assert (folder / "server" / "tls.pem").read_bytes() != after


def _authority(folder: Path) -> bytes:
    return (folder / "authority" / "authority.pem").read_bytes()


@pytest.mark.parametrize(
    ("name", "role", "kind"),
    [
        ("North", "site", AccessError),
        ("", "site", AccessError),
        ("../north", "site", AccessError),
        ("n" * 64, "site", AccessError),
        ("north", "king", AccessError),
        ("north", "coordinator", AccessError),
    ],
)
def test_nobody_is_enrolled_under_such_a_name(home: Path, name: str, role: str, kind: type[CommonweightError]) -> None:
    with pytest.raises(kind):
        enroll(home, name, role)
    with Store(load_settings(home).database_url(home)) as store:
        assert store.audit_head()[0] == 0


def test_a_token_needs_a_port_to_name(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    init(folder, CoordinatorSettings(address="127.0.0.1:0"), ["localhost"])
    with pytest.raises(RecipeError, match="no port yet"):
        enroll(folder, "north", "site")


# --- /healthz and /metrics


class Parts:
    """As much of a coordinator as its HTTP port looks at."""

    def __init__(self) -> None:
        self.metrics, self.replica, self.hub = Metrics(), "r1", SimpleNamespace(streams={"north": 1, "south": 2})
        self.store, self.blobs = SimpleNamespace(audit_head=lambda: (0, b"")), SimpleNamespace(check=lambda: None)


@contextmanager
def serving(parts: Any, address: str = "127.0.0.1:0") -> Iterator[str]:
    http = serve_http(address, parts)
    try:
        host = "[::1]" if ":" in str(http.server_address[0]) else "127.0.0.1"
        yield f"http://{host}:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()


def get(url: str) -> tuple[int, str, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read()


def test_health_is_that_of_database_and_blobs() -> None:
    def away() -> None:
        raise StorageError("the bucket is gone", retry=True)

    parts = Parts()
    with serving(parts) as url:
        status, kind, body = get(url + "/healthz")
        assert (status, kind) == (200, "application/json")
        assert json.loads(body) == {"ok": True, "replica": "r1", "attending": 2}
        parts.blobs.check = away
        status, _, body = get(url + "/healthz")
        assert status == 503
        assert json.loads(body) == {"ok": False, "replica": "r1", "attending": 2, "blobs": "the bucket is gone"}
        parts.store.audit_head, parts.blobs.check = away, lambda: None
        assert json.loads(get(url + "/healthz")[2])["database"] == "the bucket is gone"


def test_metrics_are_prometheuss() -> None:
    parts = Parts()
    parts.metrics.attending.set(2)
    parts.metrics.uploads.labels("accepted").inc()
    parts.metrics.denied.labels("Control/Submit").inc(3)
    with serving(parts) as url:
        status, kind, body = get(url + "/metrics")
        assert status == 200
        assert kind.startswith("text/plain")
        lines = body.decode().splitlines()
        assert "commonweight_sites_attending 2.0" in lines
        assert 'commonweight_uploads_total{outcome="accepted"} 1.0' in lines
        assert 'commonweight_denied_calls_total{method="Control/Submit"} 3.0' in lines


def test_there_is_nothing_else() -> None:
    with serving(Parts()) as url:
        for path in ("/", "/metrics/../etc/passwd", "/healthz?x=1", "/admin"):
            assert get(url + path)[0] == 404
        request = urllib.request.Request(url + "/healthz", data=b"x", method="POST")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=20)
        assert caught.value.code == 501


def test_who_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HTTP_S", 0.1)
    with serving(Parts()) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as idle:
        idle.settimeout(20)
        assert idle.recv(1) == b""


def test_an_address_of_either_kind() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with serving(Parts(), "[::1]:0") as url:
        assert get(url + "/healthz")[0] == 200


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=f"cannot listen on {address}") as caught:
            serve_http(address, Parts())  # type: ignore[arg-type]
        assert caught.value.retry


# --- logs


def record(message: str, *arguments: Any, **more: Any) -> logging.LogRecord:
    return logging.getLogger("commonweight.test").makeRecord(
        "commonweight.coordinator.hub", logging.WARNING, "f", 1, message, arguments, more.get("exc_info")
    )


@pytest.mark.parametrize("text", ["plain", 'a "quote"', "two\nlines", "\x1b[2J", "naïve ☃", "\x9b2J", "\ud800"])
def test_a_log_line_is_one_json_object(text: str) -> None:
    line = JsonLines().format(record("site %s is away", text))
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    assert found["message"] == f"site {text} is away"
    assert (found["level"], found["logger"]) == ("warning", "coordinator.hub")
    assert isinstance(found["t"], float)


def test_a_traceback_stays_within_its_line() -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        line = JsonLines().format(record("a defect", exc_info=(ValueError, error, error.__traceback__)))
    assert "\n" not in line
    assert json.loads(line)["traceback"].endswith("ValueError: wrong")


def test_logs_go_to_standard_error_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("commonweight")
    before = logger.handlers, logger.level, logger.propagate
    try:
        log_to_stderr()
        log_to_stderr()
        logging.getLogger("commonweight.coordinator.server").info("serving")
        lines = capsys.readouterr().err.splitlines()
    finally:
        logger.handlers, logger.level, logger.propagate = before
    assert [json.loads(line)["message"] for line in lines] == ["serving"]
