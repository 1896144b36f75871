"""`/docs`: the OpenAPI document as a page. It needs no script and no file of another server."""

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from trueup.api.page.rendering import pages_of
from trueup.api.page.routes import PageRoute

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation. `inputs`: name, type and description of each parameter and body field; `answers`: by status."""

    method: str
    path: str
    summary: str
    description: str
    needs_token: bool
    inputs: list[tuple[str, str, str]]
    answers: list[tuple[str, str, str]]


@router.get("/docs")
def docs(request: Request) -> Response:
    """Show all operations of the API, with their inputs and answers."""
    document = request.app.openapi()
    groups: dict[str, list[Operation]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            group = (operation.get("tags") or ["other"])[0]
            groups.setdefault(group, []).append(_operation(document, method.upper(), path, operation))
    return pages_of(request).answer(
        request, "docs.html.jinja", None, groups=groups, version=document["info"]["version"],
        introduction=document["info"].get("description", "").strip(),
    )  # fmt: skip


def _operation(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> Operation:
    parameters = [
        (f"{one['name']} ({one['in']})", _type(one.get("schema", {})), one.get("description", ""))
        for one in operation.get("parameters", [])
    ]
    body = _schema(operation.get("requestBody", {}))
    return Operation(
        method=method,
        path=path,
        summary=operation.get("summary", ""),
        description=operation.get("description", ""),
        needs_token="security" in operation,
        inputs=[*parameters, *_fields(document, body)],
        answers=[
            (code, _type(_schema(answer)), answer.get("description", ""))
            for code, answer in sorted(operation.get("responses", {}).items())
        ],
    )


def _schema(part: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a body or an answer; empty if it has none."""
    for content in part.get("content", {}).values():
        schema: dict[str, Any] = content.get("schema", {})
        return schema
    return {}


def _fields(document: dict[str, Any], schema: dict[str, Any]) -> list[tuple[str, str, str]]:
    named = _resolved(document, schema)
    required = set(named.get("required", []))
    return [
        (f"{name}{'' if name in required else ' (optional)'}", _type(field), field.get("description", ""))
        for name, field in named.get("properties", {}).items()
    ]


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _type(schema: dict[str, Any]) -> str:
    """Return a schema's type in words: "integer", "list of text", the name of an object."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    return str(schema.get("type", "anything")).replace("string", "text")
