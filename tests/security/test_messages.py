"""What errors say: never where things lie on the daemon's machine, of which class they were, or how it came to them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.rpc.access import Gate
from opd_daemon.rpc.interceptor import Border, without_home
from opd_daemon.v1 import catalog_pb2, run_pb2, teacher_pb2, worker_pb2
from opd_daemon.wire.errors import from_rpc_error
from tests.asynchronous import asynchronous
from tests.tiny import write_tiny_qwen2

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in (teacher_pb2, run_pb2, catalog_pb2, worker_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
SECRET = "/home/somebody/models/private"
TOKEN = "t" * 43
AUTH = (("authorization", f"Bearer {TOKEN}"),)
# Names of classes as Python and C++ write them, tracebacks, representations of objects, places in source code.
INSIDES = re.compile(
    r"\b[A-Z]\w*(Error|Exception|Warning|Fault)\b|Traceback|<class|object at 0x|File \"|\.py\b|std::|\n"
)
ABSOLUTE = re.compile(r"(?<![\w.:}])/[\w.-]+(?:/[\w.-]+)+")


def told(error: OpdError) -> list[str]:
    """Everything an error brings to the client."""
    return [error.message, *(fault.description for fault in error.violations), *error.metadata.values()]


def leaks(error: OpdError, sent: str = "") -> list[str]:
    """What no error may say; paths that were sent may come back."""
    found = [match.group() for text in told(error) for match in INSIDES.finditer(text)]
    paths = [match.group() for text in told(error) for match in ABSOLUTE.finditer(text)]
    return found + [path for path in paths if path not in sent and not (sent and sent in path)]


def test_the_net_catches_what_it_should() -> None:
    for text in (f"{SECRET}: no such file", "KeyError: 'x'", "<class 'int'>", 'File "x", line 3', "server.py", "a\nb"):
        assert leaks(OpdError(Reason.INTERNAL, text)), text
        assert leaks(OpdError(Reason.INTERNAL, "", violations=[FieldViolation("f", text)]))
        assert leaks(OpdError(Reason.INTERNAL, "", detail=text))
    assert not leaks(OpdError(Reason.INTERNAL, f"{SECRET}: no such file; give a folder"), sent=SECRET)


def ask(channel: grpc.Channel, name: str, data: bytes, metadata: Any = None) -> OpdError | None:
    """The error of one call with this message; None where it answers."""
    method = METHODS[name]
    way = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call: Any = getattr(channel, way)(name)
    try:
        answer = call(iter([data]) if method.client_streaming else data, metadata=metadata, timeout=20)
        for number, _ in enumerate(answer if method.server_streaming else ()):
            if number == 1:  # a watch never ends by itself
                answer.cancel()
                return None
    except grpc.RpcError as error:
        return from_rpc_error(error)
    return None


class _Broken(grpc.GenericRpcHandler):
    """Every method there is, each failing in its own way as it begins or after its first answer."""

    def __init__(self, fault: BaseException) -> None:
        self._fault = fault

    def service(self, handler_call_details: Any) -> Any:
        method = METHODS[handler_call_details.method]
        fault = self._fault

        async def unary(request: Any, context: Any) -> Any:
            raise fault

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            yield method.output_type._concrete_class()
            raise fault

        name = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        make = getattr(grpc, f"{name}_rpc_method_handler")
        parse = method.input_type._concrete_class.FromString
        answer: Callable[..., Any] = stream if method.server_streaming else unary
        return make(answer, request_deserializer=parse, response_serializer=lambda message: message.SerializeToString())


@pytest.mark.parametrize(
    "fault",
    [
        ValueError(f"secret {SECRET}"),
        FileNotFoundError(2, "No such file or directory", SECRET),
        KeyError(SECRET),
        MemoryError(),
        RecursionError(),
        AssertionError(f"{SECRET}\nline two"),
        StopAsyncIteration(),
        UnicodeDecodeError("utf-8", b"x", 0, 1, SECRET),
    ],
    ids=lambda fault: type(fault).__name__,
)
@asynchronous
async def test_whatever_breaks_inside_any_call_says_nothing_of_it(tmp_path: Path, fault: BaseException) -> None:
    server = grpc.aio.server(interceptors=[Border(Gate(TOKEN, {}.get), Home(tmp_path))])
    server.add_generic_rpc_handlers((_Broken(fault),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        for name, error in await asyncio.to_thread(_walk, f"127.0.0.1:{port}"):
            assert error is not None
            assert error.reason is Reason.INTERNAL, name
            assert not leaks(error), (name, told(error))
            assert error.metadata["request_id"] in error.message
    finally:
        await server.stop(None)


def _walk(address: str) -> list[tuple[str, OpdError | None]]:
    with grpc.insecure_channel(address) as channel:
        return [(name, ask(channel, name, b"", AUTH)) for name in METHODS]


def test_the_daemons_home_is_called_by_its_name(tmp_path: Path) -> None:
    fault = OpdError(
        Reason.DISK_FULL,
        f"{tmp_path}/configs/x: full",
        violations=[FieldViolation("f", f"{tmp_path}/y")],
        path=tmp_path,
    )
    shown = without_home(fault, Home(tmp_path))
    assert told(shown) == ["$OPD_HOME/configs/x: full", "$OPD_HOME/y", "$OPD_HOME"]
    assert shown.reason is Reason.DISK_FULL


# A real daemon


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    broken = {
        "config": ("config.json", "{"),
        "list": ("config.json", "[]"),
        "type": ("config.json", '{"model_type": "no_such_model"}'),
        "numbers": ("config.json", '{"model_type": "qwen2", "hidden_size": "many"}'),
        "tokenizer": ("tokenizer.json", "{"),
        "vocabulary": ("tokenizer.json", '{"model": {"vocab": 3}}'),
        "settings": ("tokenizer_config.json", "["),
        "sizes": ("config.json", '{"model_type": "qwen2", "hidden_size": 7}'),
        "weights": ("model.safetensors", "weights"),
    }
    for name, (file, content) in broken.items():
        write_tiny_qwen2(folder / name, seed=1)
        (folder / name / file).write_text(content)
    (folder / "empty").mkdir()
    return folder


FAULTY = ("config", "list", "type", "numbers", "tokenizer", "vocabulary", "settings", "sizes", "weights", "empty")


@pytest.fixture
def client(local: LocalDaemon) -> Iterator[Client]:
    with local.client() as client:
        yield client


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\x0a\x04nope", b"\x0a\x02\xc3\x28", b"\x0a\x00\x12\x00\x1a\x00"])
def test_no_call_leaks_by_what_it_is_sent(client: Client, name: str, data: bytes) -> None:
    error = ask(client.channel, name, data)
    assert error is None or not leaks(error), told(error)
    assert error is None or error.reason is not Reason.INTERNAL, error


@pytest.mark.parametrize("name", FAULTY)
def test_a_broken_teacher_leaks_nothing(client: Client, models: Path, name: str) -> None:
    path = str(models / name)
    with pytest.raises(OpdError) as refused:
        list(client.load_teacher(path))
    assert not leaks(refused.value, sent=path), told(refused.value)


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("field", ["base_model_path", "teacher_model_path", "student_adapter_path", "prompts_path"])
def test_a_broken_run_leaks_nothing(client: Client, models: Path, name: str, field: str) -> None:
    paths = dict.fromkeys(("base_model_path", "teacher_model_path", "prompts_path"), str(models / "empty"))
    path = str(models / name)
    with pytest.raises(OpdError) as refused:
        client.create_run({**paths, field: path}, validate_only=True)
    assert not leaks(refused.value, sent=str(models)), told(refused.value)


def test_what_tilde_stands_for_is_not_told(client: Client) -> None:
    paths = dict.fromkeys(("base_model_path", "teacher_model_path", "prompts_path"), "~/no such place")
    with pytest.raises(OpdError) as refused:
        client.create_run(paths, validate_only=True)
    assert all("~/no such place" in fault.description for fault in refused.value.violations)
    assert not any(str(Path.home()) in text for text in told(refused.value))
