"""GET /docs: the OpenAPI document as one page to read. No script, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --link: light-dark(#0b57d0, #8ab4f8);
  --get: light-dark(#0a6b4b, #5fd3a4); --post: light-dark(#7a3e00, #f0b36a); }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem 1.25rem 4rem;
  background: light-dark(#fff, #16181c); color: light-dark(#1c1e21, #e4e6ea) }
h1 { margin: .5rem 0 } h2 { margin: 3rem 0 1rem; border-bottom: 1px solid var(--line) }
h3 { margin: 2.5rem 0 .5rem; overflow-wrap: anywhere } h4 { margin: 1.25rem 0 .25rem }
a { color: var(--link) } nav a { display: inline-block; margin: 0 .9rem .35rem 0 }
code, pre { font: .875em/1.45 ui-monospace, monospace } code { overflow-wrap: anywhere }
pre { background: var(--soft); padding: .75rem 1rem; border-radius: .4rem; overflow-x: auto; margin: .4rem 0 1rem }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 1rem }
td, th { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-top: 1px solid var(--line) }
td:first-child { white-space: nowrap } .must { color: var(--post); font-size: .8em }
.verb { font: 700 .75em ui-monospace, monospace; text-transform: uppercase; margin-right: .5rem }
.get { color: var(--get) } .post { color: var(--post) }
details { margin: .4rem 0 } summary { cursor: pointer }
@media (max-width: 40rem) { td, th { display: block; border: 0; padding: 0; white-space: normal !important }
  tr { display: block; border-top: 1px solid var(--line); padding: .4rem 0 } thead { display: none } }
"""
FAR = 2**31 - 1  # limits from here on are those of the number's type


def docs_page(document: dict[str, Any]) -> str:
    title = escape(document["info"]["title"])
    operations = [
        (method, path, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    body = [
        f"<h1>{title}</h1>",
        f"<p>{_inline(document['info']['description'])} Its address is <code>{escape(_address(document))}</code>; the ",
        'openai SDK wants <code>/v1</code> behind it. The same as a document for programs: <a href="openapi.json">',
        "openapi.json</a>.</p>",
        *_contents(operations),
        "<h2 id=start>First steps</h2>",
        *_first_steps(operations),
        "<h2 id=errors>Errors</h2>",
        *_errors(document),
        "<h2 id=reference>Reference</h2>",
        *(line for operation in operations for line in _operation(document, *operation)),
        "<h2 id=schemas>Schemas</h2>",
        *(line for name, schema in document["components"]["schemas"].items() for line in _schema(name, schema)),
    ]
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><body>{chr(10).join(body)}</body></html>"
    )


def _address(document: dict[str, Any]) -> str:
    return document["servers"][0]["url"]


def _contents(operations: list[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
    yield "<nav><h4>First steps</h4>"
    for _, _, operation in operations:
        for label in dict.fromkeys(code["label"] for code in operation.get("x-codeSamples", ())):
            yield f'<a href="#{_anchor(label)}">{escape(label)}</a>'
    yield '<a href="#errors">Errors</a><h4>Reference</h4>'
    for method, path, operation in operations:
        yield f'<a href="#{operation["operationId"]}">{_verb(method)}{escape(path)}</a>'
    yield "</nav>"


def _first_steps(operations: list[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
    for _, _, operation in operations:
        for label, codes in groupby(operation.get("x-codeSamples", ()), lambda code: code["label"]):
            samples = list(codes)
            yield f'<h3 id="{_anchor(label)}">{escape(label)}</h3>'
            yield f"<p>{_inline(samples[0]['x-says'])}</p>"
            for code in samples:
                yield f"<pre><code>{escape(code['source'])}</code></pre>"


def _errors(document: dict[str, Any]) -> Iterator[str]:
    yield (
        "<p>Every error is a body of this form; <code>param</code> names the field that is wrong. Each answer has the "
        "header <code>x-request-id</code>, which is also in the server's log. 429 and 503 come with "
        "<code>retry-after</code>.</p>"
    )
    yield from _properties(document["components"]["schemas"]["ErrorDetails"])


def _operation(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f'<h3 id="{operation["operationId"]}">{_verb(method)}<code>{escape(path)}</code></h3>'
    yield f"<p><b>{escape(operation['summary'])}.</b> {_inline(operation.get('description', ''))}</p>"
    for parameter in operation.get("parameters", ()):
        says = _inline(parameter.get("description", ""))
        kind, name = _type(parameter["schema"]), escape(parameter["name"])
        yield f"<p>In the {parameter['in']}: <code>{name}</code>, {kind}. {says}</p>"
    if content := operation.get("requestBody", {}).get("content"):
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        yield "<h4>Body</h4>"
        yield from _properties(document["components"]["schemas"][name])
    yield "<h4>Answers</h4><table><thead><tr><th>Status<th>What<th>Body</thead>"
    for status, answer in operation["responses"].items():
        kinds = [f"{escape(media)}: {_type(_payload(form))}" for media, form in answer["content"].items()]
        yield f"<tr><td>{status}<td>{_inline(answer['description'])}<td>{'<br>'.join(kinds)}"
    yield "</table>"


def _payload(form: dict[str, Any]) -> dict[str, Any]:
    """What an answer is: an event's data, or the whole of it."""
    data = form["schema"].get("properties", {}).get("data", {})
    forms = [form["contentSchema"] for form in (data, *data.get("anyOf", ())) if "contentSchema" in form]
    return forms[0] if forms else form["schema"]


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f'<details id="schema-{escape(name)}"><summary><code>{escape(name)}</code></summary>'
    if "description" in schema:
        yield f"<p>{_inline(schema['description'])}</p>"
    if "properties" in schema:
        yield from _properties(schema)
    else:
        yield f"<p>{_type(schema)}</p>"
    yield "</details>"


def _properties(schema: dict[str, Any]) -> Iterator[str]:
    yield "<table><thead><tr><th>Field<th>Type<th>What it means</thead>"
    required = schema.get("required", ())
    for name, field in sorted(schema["properties"].items(), key=lambda item: item[0] not in required):
        must = " <span class=must>required</span>" if name in required and schema["title"].endswith("Body") else ""
        default = f" Default: <code>{escape(repr(field['default']))}</code>." if "default" in field else ""
        says = _inline(field.get("description", ""))
        yield f"<tr><td><code>{escape(name)}</code>{must}<td>{_type(field)}<td>{says}{default}"
    yield "</table>"


def _type(schema: dict[str, Any]) -> str:
    """In words and links, null left out: it means the same as no field at all."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(inner) for inner in schema["anyOf"] if inner.get("type") != "null")
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        inner = _type(schema.get("items", {}))
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if isinstance(values := schema.get("additionalProperties"), dict):
        return f"object of {_type(values)}"
    return escape(f"{schema.get('type', 'anything')}{_limits(schema)}")


def _limits(schema: dict[str, Any]) -> str:
    words = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
    found = [form.format(schema[word]) for word, form in words.items() if abs(schema.get(word, FAR)) < FAR]
    return f" {', '.join(found)}" if found else ""


def _inline(text: str) -> str:
    """Escaped, with `code` in backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _verb(method: str) -> str:
    return f'<span class="verb {method}">{method}</span>'


def _anchor(label: str) -> str:
    return re.sub(r"\W+", "-", label.lower())
