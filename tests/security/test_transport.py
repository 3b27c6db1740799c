"""Which addresses are served, to whom, and what leaves this machine."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from opd_daemon.addresses import is_this_machine, split_address
from opd_daemon.client import Client, LocalDaemon, find_endpoint
from opd_daemon.client.transport import ClientTls
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.rpc.listening import Listener, ServerTls
from tests.security.conftest import Papers, Remote


def opd(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "opd_daemon.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OPD_HOME": str(home), **environment},
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.168.7.7:7000", "example.com:7000", "0x7f000001:7000"])
def test_an_address_others_can_reach_needs_tls(address: str) -> None:
    with pytest.raises(OpdError, match="needs TLS; give --tls-cert and --tls-key") as refused:
        Listener.parse(address, None)
    assert refused.value.reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.3.2.1:7000", "[::1]:0", "localhost:7000"])
def test_loopback_needs_no_tls(address: str) -> None:
    assert Listener.parse(address, None).tls is None


@pytest.mark.parametrize(
    "address", ["", "7000", "host:", ":7000", "::1:7000", "host:70000", "host:x", "a b:1\n", "http://h:1"]
)
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(OpdError, match="is not HOST:PORT"):
        Listener.parse(address, None)
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        split_address(address)


def test_serve_refuses_to_start_in_the_open(tmp_path: Path) -> None:
    done = opd(tmp_path, "serve", "--listen", "0.0.0.0:0")
    assert done.returncode != 0
    assert "--listen 0.0.0.0:0: other machines can reach it, so it needs TLS" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Home(tmp_path).discovery.exists()


def test_broken_papers_are_named_before_anything_is_served(papers: Papers, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no PEM")
    server = papers.certificate("server"), papers.key("server")
    for tls in (
        ServerTls(tmp_path / "missing.pem", server[1]),
        ServerTls(broken, server[1]),
        ServerTls(server[0], papers.key("client")),
        ServerTls(*server, client_ca=broken),
    ):
        with pytest.raises(OpdError, match=r"missing\.pem|broken\.pem|key values mismatch") as refused:
            tls.credentials()
        assert refused.value.reason is Reason.INVALID_REQUEST


def test_a_remote_client_works_by_address_token_file_and_ca(far_client: Client) -> None:
    assert far_client.connection.endpoint.remote
    assert far_client.teacher()[0] == "UNLOADED"
    assert list(far_client.runs()) == []


def test_the_command_line_reaches_a_remote_daemon(remote: Remote, tmp_path: Path) -> None:
    way = remote.environment
    arguments = ["--address", way["OPD_ADDRESS"], "--token-file", way["OPD_TOKEN_FILE"], "--ca", way["OPD_CA"]]
    done = opd(tmp_path, *arguments, "trainers", OPD_TOKEN="of another daemon")
    assert done.returncode == 0, done.stderr
    assert "on_policy" in done.stdout


def test_the_tls_address_answers_no_plain_text(remote: Remote) -> None:
    token = remote.token_file.read_text().strip()
    with Client(remote.facts["listening"], token) as client, pytest.raises(OpdError) as refused:
        client.teacher()
    assert refused.value.reason is Reason.DAEMON_NOT_RUNNING


def test_a_certificate_of_another_authority_is_not_believed(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_CA", str(remote.papers.foreign_ca))
    token = remote.token_file.read_text().strip()
    with Client(remote.facts["listening"], token) as client, pytest.raises(OpdError) as refused:
        client.teacher()
    assert refused.value.reason is Reason.DAEMON_NOT_RUNNING
    assert "--ca" in refused.value.message


def test_tls_alone_opens_nothing(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_CA", str(remote.papers.ca))
    with Client(remote.facts["listening"], "x" * 43) as client, pytest.raises(OpdError) as refused:
        client.teacher()
    assert refused.value.reason is Reason.WRONG_TOKEN


def test_with_a_client_ca_only_its_clients_connect(papers: Papers) -> None:
    import asyncio

    asyncio.run(_mutual(papers))


async def _mutual(papers: Papers) -> None:
    server = grpc.aio.server()
    tls = ServerTls(papers.certificate("server"), papers.key("server"), papers.ca)
    address = Listener.parse("127.0.0.1:0", tls).bind(server)
    await server.start()
    try:
        for name, connects in (("client", True), ("stranger", False), ("", False)):
            files = (str(papers.certificate(name)), str(papers.key(name))) if name else ("", "")
            credentials = ClientTls(str(papers.ca), *files).credentials()
            async with grpc.aio.secure_channel(address, credentials) as channel:
                call = channel.unary_unary("/no.such/Method")
                with pytest.raises(grpc.aio.AioRpcError) as answer:
                    await call(b"", timeout=5)
                reached = answer.value.code() is grpc.StatusCode.UNIMPLEMENTED
                assert reached is connects, (name, answer.value.code())
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("unix:/tmp/opd.sock", True),
        ("127.0.0.1:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("192.168.0.7:1", False),
        ("dns:///daemon.example:1", False),
        ("localhost.example:1", False),
        ("0.0.0.0:1", False),
        ("2130706433:1", False),
        ("127.0.0.1.evil.example:1", False),
        ("xds:///daemon", False),
        ("127.0.0.1:1,evil.example:1", False),
    ],
)
def test_only_plainly_local_addresses_go_unencrypted(address: str, local: bool) -> None:
    assert is_this_machine(address) is local
    assert (ClientTls.of_environment(address, {}) is None) is local


def test_loopback_is_encrypted_where_a_ca_is_named() -> None:
    assert ClientTls.of_environment("127.0.0.1:1", {"OPD_CA": "ca.pem"}) == ClientTls("ca.pem")
    assert ClientTls.of_environment("unix:/tmp/opd.sock", {"OPD_CA": "ca.pem"}) is None


def test_the_local_token_is_never_sent_to_another_machine(daemon_home: Home) -> None:
    with pytest.raises(OpdError, match=r"no token for the daemon at daemon\.example:7000") as refused:
        find_endpoint(daemon_home, "daemon.example:7000")
    assert refused.value.reason is Reason.MISSING_TOKEN


def test_a_proxy_never_sees_what_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.create_server(("127.0.0.1", 0)) as daemon:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        proxy.settimeout(0.2)
        daemon.settimeout(10)
        with Client(f"127.0.0.1:{daemon.getsockname()[1]}", "secret") as client:
            asked = grpc.channel_ready_future(client.channel)
            daemon.accept()[0].close()
            with pytest.raises(TimeoutError):
                proxy.accept()
            asked.cancel()


def test_socket_and_discovery_file_are_the_owners_alone(local: LocalDaemon) -> None:
    facts = json.loads(local.home.discovery.read_text())
    for path, mode in (
        (local.home.root, 0o700),
        (local.home.runtime, 0o700),
        (local.home.discovery, 0o600),
        (Path(facts["socket"]), 0o600),
    ):
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, os.geteuid()), path
    assert len(facts["token"]) >= 43


def test_an_open_runtime_folder_is_closed_at_the_start(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.runtime.mkdir(parents=True)
    home.runtime.chmod(0o777)
    home.discovery.write_text("{}")
    home.discovery.chmod(0o666)
    with LocalDaemon(home):
        assert stat.S_IMODE(home.runtime.stat().st_mode) == 0o700
        assert stat.S_IMODE(home.discovery.stat().st_mode) == 0o600


def test_a_discovery_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    from opd_daemon.rpc.server import _publish

    target = tmp_path / "precious"
    target.write_text("kept")
    file = tmp_path / "daemon.json"
    file.symlink_to(target)
    # What a daemon that was killed between writing and renaming leaves, and another with its pid finds.
    file.with_suffix(f".{os.getpid()}.tmp").symlink_to(target)
    _publish(file, {"token": "t"})
    assert target.read_text() == "kept"
    assert json.loads(file.read_text()) == {"token": "t"}
    assert not file.is_symlink()
