"""What an HTTP endpoint takes and gives, as a page that needs no network and no scripts."""

from collections.abc import Iterator
from typing import Any

from captionscale.escape import for_html

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd }
code, pre { font: 14px/1.5 ui-monospace, monospace; background: #f3f3f3 }
code { padding: .1rem .25rem } pre { padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
"""


def render_api_docs(openapi: dict[str, Any], base: str) -> str:
    """Return the page.

    Args:
        openapi: The description that FastAPI makes.
        base: Where the endpoint is, for the examples.
    """
    info, described = openapi["info"], for_html(f"{base}/openapi.json")
    parts = [
        f"<h1>{for_html(info['title'])}</h1><p>{for_html(info['description'])}</p>",
        f'<p>For programs: <a href="{described}">openapi.json</a>, OpenAPI {openapi["openapi"]}.</p>',
    ]
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts += _operation(method.upper(), path, operation, openapi, base)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{for_html(info["title"])}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def _operation(
    method: str, path: str, operation: dict[str, Any], openapi: dict[str, Any], base: str
) -> Iterator[str]:
    yield f"<h2>{method} {for_html(path)}</h2>"
    yield f"<p>{for_html(operation['summary'])}. {for_html(operation.get('description', ''))}</p>"
    curl = f"curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' '{base}{path}?beam=3'"
    python = (
        "import httpx\n\n"
        f'answer = httpx.post("{base}{path}", content=open("photo.jpg", "rb").read(),\n'
        '                    headers={"Content-Type": "image/jpeg"}, params={"beam": 3})\n'
        'print(answer.json()["caption"])'
    )
    yield f"<pre>{for_html(curl)}</pre><pre>{for_html(python)}</pre>"
    yield "<h3>Options, in the query</h3><table><tr><th>name</th><th>values</th><th>meaning</th></tr>"
    for option in operation.get("parameters", []):
        meaning = option.get("description") or option["schema"].get("description", "")
        yield _row(f"<code>{for_html(option['name'])}</code>", _values(option["schema"]), _text(meaning))
    yield "</table><h3>Body</h3><p>"
    yield ", ".join(f"<code>{for_html(kind)}</code>" for kind in operation["requestBody"]["content"])
    yield "</p><h3>Answers</h3><table><tr><th>status</th><th>when</th><th>JSON</th></tr>"
    for status, answer in operation["responses"].items():
        schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
        shown = f"<code>{for_html(_shape(schema, openapi))}</code>"
        yield _row(for_html(status), for_html(answer["description"]), shown)
    yield "</table>"


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _text(description: str) -> str:
    """Return a config's description, whose code stands between backticks."""
    return "".join(
        f"<code>{for_html(part)}</code>" if number % 2 else for_html(part)
        for number, part in enumerate(description.split("`"))
    )


def _values(schema: dict[str, Any]) -> str:
    """Say which values an option takes."""
    schema = next((each for each in schema.get("anyOf", []) if each.get("type") != "null"), schema)
    if "enum" in schema:
        return " or ".join(f"<code>{for_html(str(each))}</code>" for each in schema["enum"])
    bounds = {"minimum": "from ", "exclusiveMinimum": "above ", "maximum": "to "}
    limits = "".join(f", {word}{schema[key]:g}" for key, word in bounds.items() if key in schema)
    return for_html(str(schema.get("type", "")) + limits)


def _shape(schema: dict[str, Any], openapi: dict[str, Any]) -> str:
    """Return what JSON of a schema looks like."""
    if "$ref" in schema:
        return _shape(openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]], openapi)
    if schema.get("type") == "array":
        return f"[{_shape(schema['items'], openapi)}, ...]"
    if "properties" in schema:
        inner = ", ".join(f'"{key}": {_shape(each, openapi)}' for key, each in schema["properties"].items())
        return f"{{{inner}}}"
    return str(schema.get("type", "anything"))
