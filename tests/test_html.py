import pytest
from jinja2 import DictLoader, UndefinedError
from markupsafe import Markup

from captionscale import html

TEMPLATES = {
    "page.html": '<p title="{{ text }}">{{ text }}</p>{{ markup }}',
    "page.md": "{{ text }} {{ text|code }} {{ 0.5|number('.2f') }}",
}


@pytest.fixture(autouse=True)
def _templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html._environment(), "loader", DictLoader(TEMPLATES))


def test_every_value_is_escaped_and_has_no_control_characters() -> None:
    page = html.render("page.html", text='"<b>\x1b\u202e', markup=Markup("<i>\x1b</i>"))
    safe = r"&quot;&lt;b&gt;\u001b\u202e"
    assert page == rf'<p title="{safe}">{safe}</p><i>\u001b</i>'
    assert html.render("page.md", text="<b>_a\x1b") == r"\<b\>\_a\\u001b `<b>_a\u001b` 0.50"


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        html.render("page.html", text="")
