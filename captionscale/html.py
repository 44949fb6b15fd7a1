"""Pages made from the jinja2 templates in `captionscale/templates/`, which escape every value."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_eval_context
from jinja2.nodes import EvalContext
from markupsafe import Markup

from captionscale.escape import for_html, for_markdown, for_markdown_code, for_terminal_lines


def render(template: str, **values: Any) -> Markup:
    """Render a template with values that `captionscale.escape` makes safe for HTML or, in `*.md`, Markdown.

    Of a `Markup` value, such as the result of another `render`, only control characters are escaped. A
    variable that is missing is an error.
    """
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=lambda name: name is None or not name.endswith(".md"),
        finalize=_escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Markdown would escape the point of a number at the start of a line.
    environment.filters["number"] = lambda value, spec=",": Markup(format(value, spec))
    environment.filters["code"] = lambda text: Markup(for_markdown_code(str(text)))
    return environment


@pass_eval_context
def _escape(context: EvalContext, value: Any) -> Markup:
    """Escape what a template prints; jinja2's own escaping would leave control characters."""
    if hasattr(value, "__html__"):
        return Markup(for_terminal_lines(value.__html__()))
    return Markup(for_html(str(value)) if context.autoescape else for_markdown(str(value)))
