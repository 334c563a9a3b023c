"""The generated modules say what protocol.proto says; `make proto` writes them anew."""

from __future__ import annotations

import ast
from importlib import resources
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

from commonweight.wire import protocol_pb2 as pb
from commonweight.wire import service

NAME = "commonweight/wire/protocol.proto"
WIRE = Path(str(resources.files("commonweight.wire")))


@pytest.fixture(scope="module")
def proto(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorProto:
    """protocol.proto, compiled here and now."""
    from grpc_tools import protoc

    path = tmp_path_factory.mktemp("proto") / "set"
    source = WIRE.parent.parent
    assert protoc.main(["protoc", f"-I{source}", f"--descriptor_set_out={path}", str(source / NAME)]) == 0
    return FileDescriptorSet.FromString(path.read_bytes()).file[0]


def test_the_module_is_current(proto: FileDescriptorProto) -> None:
    generated = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(generated)
    for message in (*proto.message_type, *generated.message_type):
        _forget_json_names(message)
    assert generated == proto


def _forget_json_names(message: DescriptorProto) -> None:
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        _forget_json_names(nested)


def test_the_types_are_current(proto: FileDescriptorProto) -> None:
    tree = ast.parse((WIRE / "protocol_pb2.pyi").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for message in proto.message_type:
        says = set(_names(classes.pop(message.name)))
        assert {field.name for field in message.field} <= says
        assert {f"{field.name.upper()}_FIELD_NUMBER" for field in message.field} == {
            name for name in says if name.endswith("_FIELD_NUMBER")
        }
        assert {value.name for enum in message.enum_type for value in enum.value} <= says
    assert [name for name in classes if not name.startswith("_")] == []


def _names(node: ast.ClassDef) -> list[str]:
    found = []
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found.append(child.target.id)
        elif isinstance(child, ast.FunctionDef):
            found.append(child.name)
    return found


def test_the_tables_of_methods_are_the_services(proto: FileDescriptorProto) -> None:
    """Transfer is not among them: its chunks are not protobuf."""
    kinds = {
        (False, False): "unary_unary",
        (False, True): "unary_stream",
        (True, False): "stream_unary",
        (True, True): "stream_stream",
    }
    tables = {"Enrolment": service.ENROLMENT, "Federation": service.FEDERATION, "Control": service.CONTROL}
    assert {declared.name for declared in proto.service} == set(tables)
    for declared in proto.service:
        table = tables[declared.name]
        assert {method.name for method in declared.method} == set(table)
        for method in declared.method:
            entry = table[method.name]
            assert entry.request is not None
            assert entry.reply is not None
            assert entry.kind == kinds[method.client_streaming, method.server_streaming]
            assert method.input_type == f".{entry.request.DESCRIPTOR.full_name}"
            assert method.output_type == f".{entry.reply.DESCRIPTOR.full_name}"
            assert entry.path == f"/{proto.package}.{declared.name}/{method.name}"
