"""The AsyncAPI document: it says what the door does, and nothing in it points nowhere."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from common.errors import BY_CODE
from common.settings import Settings
from services.gateway.asyncapi import CODES, Broker, asyncapi_page
from services.gateway.door_messages import KINDS, read_request
from tests.api_front import Front, make_front

BROKER = Broker("nats://user:secret@nats.example.com:4222", "tiny", 2048)
DOCUMENT: dict[str, Any] = json.loads(asyncapi_page(BROKER))
SPECS = "@asyncapi/specs/schemas/3.0.0-without-$id.json"


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.3)):
        yield one


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(inner)


def at(ref: str) -> Any:
    node: Any = DOCUMENT
    for word in ref.removeprefix("#/").split("/"):
        node = node[word]
    return node


async def test_the_gateway_serves_it(front: Front) -> None:
    served = (await front.http.get("/asyncapi.json")).json()
    assert served["asyncapi"] == "3.0.0"
    assert served["servers"]["nats"]["host"] == "127.0.0.1:4222"
    assert served["components"] == DOCUMENT["components"]


def test_it_tells_no_password() -> None:
    assert DOCUMENT["servers"] == {"nats": {"host": "nats.example.com:4222", "protocol": "nats"}}
    assert "secret" not in json.dumps(DOCUMENT)


def test_it_tells_how_to_connect_to_a_server_with_users_and_tls() -> None:
    broker = Broker("tls://nats.example.com:4222", "tiny", 2048, users=True, tls=True)
    server = json.loads(asyncapi_page(broker))["servers"]["nats"]
    assert (server["host"], server["protocol"]) == ("nats.example.com:4222", "nats")
    assert "TLS" in server["description"]
    (scheme,) = server["security"]
    assert scheme["type"] == "userPassword" and "_INBOX.<user>" in scheme["description"]


def test_every_reference_leads_somewhere() -> None:
    refs = {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node.get("$ref"), str)}
    assert len(refs) > 30 and all(isinstance(at(ref), dict) for ref in refs)
    named = {ref.rpartition("/")[2] for ref in refs}
    assert set(DOCUMENT["components"]["schemas"]) | set(DOCUMENT["components"]["messages"]) <= named


def test_schemas_are_schemas() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert not [node for node in nodes(DOCUMENT) if isinstance(node.get("discriminator"), dict)]


@pytest.mark.parametrize("name", [kind.__name__ for kind in KINDS.values()])
def test_an_example_is_a_request(name: str) -> None:
    ((example,), schema) = (
        DOCUMENT["components"]["messages"][name]["examples"],
        {"$ref": f"#/components/schemas/{name}"},
    )
    jsonschema.validate(example["payload"], schema | {"components": DOCUMENT["components"]})
    body, unknown = read_request(msgspec.json.encode(example["payload"]))
    assert type(body).__name__ == name and unknown == []


@pytest.mark.parametrize("name", [kind.__name__ for kind in KINDS.values()])
def test_a_request_may_name_its_callers_span(name: str) -> None:
    headers = DOCUMENT["components"]["messages"][name]["headers"]
    jsonschema.Draft202012Validator.check_schema(headers)
    assert set(headers["properties"]) == {"traceparent", "tracestate"} and "required" not in headers
    taken = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for malformed in ("", taken[:-1], taken.upper(), f"{taken}-x", f"ff{taken[2:]}", taken.replace("a", "g")):
        assert not jsonschema.Draft202012Validator(headers).is_valid({"traceparent": malformed})
    jsonschema.validate({"traceparent": taken, "tracestate": "a=1"}, headers)
    jsonschema.validate({"Authorization": "Bearer KEY"}, headers)


def test_every_field_of_a_request_is_explained() -> None:
    for kind in KINDS.values():
        fields = DOCUMENT["components"]["schemas"][kind.__name__]["properties"]
        assert [name for name, field in fields.items() if not field.get("description")] == []


def test_the_codes_are_those_of_the_error_tree() -> None:
    assert {error.code for error in CODES} <= set(BY_CODE)
    assert all(f"`{error.code}` ({error.status})" in DOCUMENT["info"]["description"] for error in CODES)


def test_it_is_valid_by_the_specification() -> None:
    """`npm install --prefix DIR @asyncapi/specs`, and DIR/node_modules in NODE_PATH, brings AsyncAPI's own schema."""
    path = specs()
    if path is None:
        pytest.skip("AsyncAPI's schema is in the npm package @asyncapi/specs, which is not installed")
    jsonschema.Draft7Validator(json.loads(path.read_text())).validate(DOCUMENT)


def specs() -> Path | None:
    folders = [Path(folder) for folder in os.environ.get("NODE_PATH", "").split(os.pathsep) if folder]
    return next((folder / SPECS for folder in folders if (folder / SPECS).is_file()), None)
