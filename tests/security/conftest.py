"""A daemon that other machines could reach, and the papers to reach it with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.home import Home
from tests.e2e.conftest import DaemonProcess


@dataclass(frozen=True)
class Papers:
    """PEM files: of the server, of a client, of the authority that signed both, and of a foreign one."""

    folder: Path

    @classmethod
    def issue(cls, folder: Path) -> Papers:
        papers = cls(folder)
        authority, foreign = trustme.CA(), trustme.CA()
        server = authority.issue_cert("127.0.0.1", "localhost")
        client, stranger = authority.issue_cert("client.example"), foreign.issue_cert("client.example")
        for name, cert in (("server", server), ("client", client), ("stranger", stranger)):
            cert.private_key_pem.write_to_path(str(papers.key(name)))
            cert.cert_chain_pems[0].write_to_path(str(papers.certificate(name)))
        authority.cert_pem.write_to_path(str(papers.ca))
        foreign.cert_pem.write_to_path(str(papers.foreign_ca))
        return papers

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def foreign_ca(self) -> Path:
        return self.folder / "foreign_ca.pem"

    @property
    def for_server(self) -> list[str]:
        return ["--tls-cert", str(self.certificate("server")), "--tls-key", str(self.key("server"))]


@dataclass(frozen=True)
class Remote:
    """A daemon that listens with TLS, its address and its token file. Clients find it by the environment alone."""

    process: DaemonProcess
    papers: Papers
    token_file: Path

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.process.home.discovery.read_text())
        return facts

    @property
    def environment(self) -> dict[str, str]:
        return {
            "OPD_ADDRESS": self.facts["listening"],
            "OPD_TOKEN_FILE": str(self.token_file),
            "OPD_CA": str(self.papers.ca),
        }


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "TOKEN", "TOKEN_FILE", "CA", "CLIENT_CERT", "CLIENT_KEY", "HOME"):
        monkeypatch.delenv(f"OPD_{name}", raising=False)


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="session")
def remote(papers: Papers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    home = Home(tmp_path_factory.mktemp("remote") / "home")
    home.root.mkdir()
    token_file = home.root.parent / "token"
    arguments = ["--listen", "127.0.0.1:0", "--token-file", str(token_file), *papers.for_server]
    process = DaemonProcess(home, *arguments)
    yield Remote(process, papers, token_file)
    process.stop()


@pytest.fixture
def far_client(remote: Remote, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """A client that knows no home of the daemon's, only what was handed to it."""
    for name, value in remote.environment.items():
        monkeypatch.setenv(name, value)
    with Client.find(Home(tmp_path / "elsewhere")) as client:
        yield client


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDaemon]:
    """A daemon as everybody starts it."""
    with LocalDaemon(Home(tmp_path_factory.mktemp("local") / "home")) as daemon:
        yield daemon


@pytest.fixture
def daemon_home(local: LocalDaemon) -> Home:
    return local.home
