"""Pieces of a page, as HTML."""

from collections.abc import Sequence

from captionscale.escape import for_html


def table(rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """Return rows, the first of which names the columns, as HTML."""
    kind = ' class="text"' if text else ""
    first, *others = rows[0]
    head = f'<th scope="col" class="text">{for_html(first)}</th>'
    head += "".join(f'<th scope="col"{kind}>{for_html(cell)}</th>' for cell in others)
    lines = []
    for name, *cells in rows[1:]:
        said = "".join(f"<td{kind}>{for_html(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row" class="text">{for_html(name)}</th>{said}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="facts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def notice(text: str) -> str:
    """Return what a reader should not pass over."""
    return f'<p class="todo">{for_html(text)}</p>'
