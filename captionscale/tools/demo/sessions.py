"""What happens when people try a run on the page."""

import base64
import csv
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from captionscale.data import decode
from captionscale.data.shards import Split
from captionscale.data.transforms import center_crop
from captionscale.errors import UserError
from captionscale.escape import for_html
from captionscale.tools.caption_result import CaptionResult, overlay
from captionscale.tools.captioner_api import GenerationRequest
from captionscale.tools.demo.service import Service
from captionscale.tools.demo.uploads import PREVIEW_SIZE, DecodedImage, Uploads, decode_upload

COLUMNS = ("file", "caption", "log p", "problem")
METHODS = ("greedy", "beam", "sampling")
_THUMBNAIL = 96


@dataclass(frozen=True, eq=False)
class PageState:
    """What somebody looks at; in memory as long as the page is open, and no longer than an hour."""

    image: DecodedImage
    references: tuple[str, ...] = ()
    captions: tuple[CaptionResult, ...] = ()
    chosen: int = 0

    @property
    def caption(self) -> CaptionResult:
        """The one whose words are shown."""
        return self.captions[self.chosen]


class SearchControls(NamedTuple):
    """How captions are to be found, as the page's controls say it, in their order."""

    how: str
    beam: int
    length_penalty: float
    draws: int
    temperature: float
    top_p: float
    seed: int | None


class PageHandlers:
    """Answers what people do on the page.

    An answer to a picture or to other settings has four parts: what is looked at from now on, the list of
    captions, the words of the chosen one with their probabilities, and the picture.
    """

    def __init__(self, service: Service, samples: Split | None, count: int, uploads: Uploads):
        """Prepare for visits.

        Args:
            service: Decodes and captions.
            samples: A split of which some pictures are offered.
            count: How many.
            uploads: What the page receives.
        """
        self._service, self._samples, self._uploads = service, samples, uploads
        spread = np.linspace(0, len(samples) - 1, min(count, len(samples))) if samples else np.zeros(0)
        self._items: list[int] = spread.astype(int).tolist()

    def thumbnails(self) -> list[Image.Image]:
        """Return what is offered, small."""
        return [_square(self._sample(item).image, _THUMBNAIL) for item in self._items]

    def on_upload(self, token: str | None, *settings: Any) -> tuple[Any, ...]:
        """Caption an upload."""
        if token is None:
            return None, gr.Radio(choices=[]), [], ""
        with _telling():
            found = self._uploads.get(token).image
            if isinstance(found, UserError):
                raise found
        return self.caption(PageState(found), *settings)

    def on_sample_select(self, event: gr.SelectData, *settings: Any) -> tuple[Any, ...]:
        """Caption one of the samples."""
        with _telling():
            seen = self._sample(self._items[_within(event.index, len(self._items), "sample")])
        return self.caption(seen, *settings)

    def caption(self, seen: PageState | None, *settings: Any) -> tuple[Any, ...]:
        """Caption what is looked at."""
        if seen is None:
            return None, gr.skip(), gr.skip(), gr.skip()
        chosen = SearchControls(*settings)
        with _telling():
            generation_request = self._wish(chosen)
            draws = int(chosen.draws) if chosen.how == "sampling" else 1
            asked = [
                self._ask(seen.image.view, generation_request, number, return_all=True)
                for number in range(draws)
            ]
            found = [caption for each in asked for caption in each.result()]
        if chosen.how == "sampling":
            # Draws have no order of their own, and several may say the same.
            found.sort(key=lambda caption: -caption.log_prob)
        captions = tuple({caption.caption: caption for caption in found}.values())
        seen = replace(seen, captions=captions, chosen=0)
        labels = [(_label(caption), number) for number, caption in enumerate(captions)]
        return seen, gr.Radio(choices=labels, value=0), *_shown(seen)

    def on_caption_select(self, event: gr.SelectData, seen: PageState | None) -> tuple[Any, ...]:
        """Show another caption's words."""
        with _telling():
            seen = _in_memory(seen)
            seen = replace(seen, chosen=_within(event.index, len(seen.captions), "caption"))
        return seen, *_shown(seen)

    def on_word_select(self, event: gr.SelectData, seen: PageState | None) -> str:
        """Show where the model looked for a word."""
        with _telling():
            seen = _in_memory(seen)
            return _picture(seen, _within(event.index, len(seen.caption.words), "word"))

    def on_files(self, tokens: Sequence[str] | None, *settings: Any) -> tuple[Any, ...]:
        """Caption files, each of which may be bad, and offer a table of them."""
        with _telling():
            generation_request = self._wish(SearchControls(*settings))
            uploads = [self._uploads.get(token) for token in tokens or ()]
        asked = [
            found
            if isinstance(found := upload.image, UserError)
            else self._ask(found.view, generation_request, number)
            for number, upload in enumerate(uploads)
        ]
        rows = [_row(upload.name, answer) for upload, answer in zip(uploads, asked, strict=True)]
        return rows, _as_csv(rows)

    def _wish(self, chosen: SearchControls) -> GenerationRequest:
        search: dict[str, Any] = {"method": "beam", "groups": 1, "length_penalty": chosen.length_penalty}
        if chosen.how == "sampling":
            search = {"method": "sample", "temperature": chosen.temperature, "top_p": chosen.top_p}
            search["seed"] = int(chosen.seed or 0)
        else:
            search["beam"] = int(chosen.beam) if chosen.how == "beam" else 1
        return self._service.pipeline.generation_request(**search)

    def _ask(self, *request: Any, **how: Any) -> Future[list[CaptionResult]]:
        return self._service.submit(*request, **how)

    def _sample(self, item: int) -> PageState:
        assert self._samples is not None
        sample = self._samples.sample(item)
        found = decode_upload(self._service, self._samples.image(item), sample.file)
        return PageState(found.result(), sample.captions)


def _within(index: int, count: int, what: str) -> int:
    if not 0 <= index < count:
        raise UserError(f"{what} {index}: not there, expected one of {count}; reload the page")
    return index


def _in_memory(seen: PageState | None) -> PageState:
    if seen is None:
        raise UserError("This page was idle for too long; drop the picture again.")
    return seen


def _row(name: str, answer: Future[list[CaptionResult]] | UserError) -> list[str]:
    if isinstance(answer, UserError):
        return [name, "", "", str(answer)]
    [caption, *_] = answer.result()
    return [name, caption.caption, f"{caption.log_prob:.4f}", ""]


@contextmanager
def _telling() -> Iterator[None]:
    """Show the page's reader what a user can fix, and the terminal no traceback of it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(for_html(str(error)), print_exception=False, duration=None) from None


def _square(picture: DecodedImage, side: int) -> Image.Image:
    """Return the centre square, which is what the model sees, as large as a page shows it."""
    return Image.fromarray(center_crop(decode.decode_image(picture.preview, "the preview"), side))


def _label(caption: CaptionResult) -> str:
    chance = float(np.exp(caption.log_prob))
    # Per cents of captions are mostly too small to be read.
    odds = (
        percent(round(100 * chance))
        if chance > 0.1
        else f"1 in {float(f'{1 / max(chance, 1e-99):.1e}'):,.0f}"
    )
    return f"{caption.caption or '(no word)'}  —  {odds}"


def percent(number: int) -> str:
    """Return what stands beside a word."""
    return f"{number} %"


def _shown(seen: PageState) -> tuple[Any, ...]:
    """Return a caption's words as the page shows them, and the picture."""
    caption = seen.caption
    percents = [percent(round(100 * each)) for each in caption.probabilities]
    return list(zip(caption.words, percents, strict=True)), _picture(seen, None)


def _picture(seen: PageState, word: int | None) -> str:
    """Return the picture with what is to be said of it, and over it where the model looked for a word."""
    caption, picture = seen.caption, _square(seen.image, PREVIEW_SIZE)
    said = "The centre square, which is all that the model sees. Click a word above."
    if caption.attention_maps is None:
        said = (
            "The centre square, which is all that the model sees. It was read once, before the first word: a"
            " decoder without attention, and an ensemble, have no place where they look for a word."
        )
    elif word is not None:
        weights = caption.attention_maps[word]
        picture = overlay(picture, weights, caption.max_attention)
        said = (
            f"For <b>{for_html(caption.words[word])}</b> (probability"
            f" {percent(round(100 * caption.probabilities[word]))}) the model looked where it is bright. It"
            f" divides the picture into {len(weights)} x {weights.shape[1]} cells."
        )
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    source = base64.b64encode(out.getvalue()).decode()
    lines = [f"<p>{said}</p>", f'<img alt="the picture" src="data:image/jpeg;base64,{source}">']
    if seen.references:
        lines.append("<p>People wrote:</p><ul>")
        lines += [f"<li>{for_html(reference)}</li>" for reference in seen.references]
        lines.append("</ul>")
    return "".join(lines)


def _as_csv(rows: Sequence[Sequence[str]]) -> str:
    """Return a link that holds a table, so that no file of it lies anywhere."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    data = base64.b64encode(out.getvalue().encode()).decode()
    return f'<a download="captions.csv" href="data:text/csv;charset=utf-8;base64,{data}">Download as CSV</a>'
