"""Event handlers of the page."""

import base64
import csv
import io
from collections.abc import Iterator, Sequence
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
from captionscale.html import render
from captionscale.tools.caption_result import CaptionResult, base64_jpeg, overlay
from captionscale.tools.captioner_api import GenerationRequest
from captionscale.tools.demo.service import Service
from captionscale.tools.demo.uploads import PREVIEW_SIZE, DecodedImage, Uploads, decode_upload

COLUMNS = ("file", "caption", "log p", "problem")
_SAMPLE_IMAGES = 8
_THUMBNAIL = 96


@dataclass(frozen=True, eq=False)
class PageState:
    """The image that a user looks at; in memory while the page is open, for an hour at most."""

    image: DecodedImage
    references: tuple[str, ...] = ()
    captions: tuple[CaptionResult, ...] = ()
    chosen: int = 0

    @property
    def caption(self) -> CaptionResult:
        """The caption whose words are shown."""
        return self.captions[self.chosen]


class SearchControls(NamedTuple):
    """Values of the page's search controls, in their order."""

    method: str
    beam: int
    length_penalty: float
    samples: int
    temperature: float
    top_p: float
    seed: int | None


@contextmanager
def _user_errors() -> Iterator[None]:
    """Show the user an error that they can fix, without a traceback in the terminal."""
    try:
        yield
    except UserError as error:
        raise gr.Error(for_html(str(error)), print_exception=False, duration=None) from None


class PageHandlers:
    """The page's event handlers.

    Those that caption return the state, the list of captions, the chosen one's words, and the image.
    """

    def __init__(self, service: Service, samples: Split | None, uploads: Uploads):
        self._service, self._samples, self._uploads = service, samples, uploads
        count = len(samples) if samples else 0
        spread = np.linspace(0, count - 1, min(_SAMPLE_IMAGES, count))
        self._items: list[int] = spread.astype(int).tolist()

    def thumbnails(self) -> list[Image.Image]:
        """Return the sample images, small."""
        return [_square(self._sample(item).image, _THUMBNAIL) for item in self._items]

    @_user_errors()
    def on_upload(self, token: str | None, *controls: Any) -> tuple[Any, ...]:
        """Caption an upload."""
        if token is None:
            return None, gr.Radio(choices=[]), [], ""
        image = self._uploads.get(token).image
        # Raising the stored error would add to its traceback each time.
        if error := image.exception():
            raise UserError(*error.args)
        return self.caption(PageState(image.result()), *controls)

    @_user_errors()
    def on_sample_select(self, event: gr.SelectData, *controls: Any) -> tuple[Any, ...]:
        """Caption a sample image."""
        state = self._sample(self._items[_checked(event.index, len(self._items), "sample")])
        return self.caption(state, *controls)

    @_user_errors()
    def caption(self, state: PageState | None, *controls: Any) -> tuple[Any, ...]:
        """Caption the image again."""
        if state is None:
            return None, gr.skip(), gr.skip(), gr.skip()
        chosen = SearchControls(*controls)
        sampling = chosen.method == "sample"
        request, view = self._request(chosen), state.image.view
        numbers = range(int(chosen.samples) if sampling else 1)
        answers = [self._service.submit(view, request, number, return_all=True) for number in numbers]
        found = [caption for answer in answers for caption in answer.result()]
        if sampling:
            found.sort(key=lambda caption: -caption.log_prob)
        # Samples may be equal.
        captions = tuple({caption.caption: caption for caption in found}.values())
        state = replace(state, captions=captions, chosen=0)
        labels = [(_label(caption), number) for number, caption in enumerate(captions)]
        return state, gr.Radio(choices=labels, value=0), *_shown(state)

    @_user_errors()
    def on_caption_select(self, event: gr.SelectData, state: PageState | None) -> tuple[Any, ...]:
        """Show another caption."""
        state = _in_memory(state)
        state = replace(state, chosen=_checked(event.index, len(state.captions), "caption"))
        return state, *_shown(state)

    @_user_errors()
    def on_word_select(self, event: gr.SelectData, state: PageState | None) -> str:
        """Show the attention of a word."""
        state = _in_memory(state)
        return _attention_html(state, _checked(event.index, len(state.caption.words), "word"))

    @_user_errors()
    def on_files(self, tokens: Sequence[str] | None, *controls: Any) -> tuple[Any, ...]:
        """Caption files, any of which may be damaged; return rows of a table, and a link to it as CSV."""
        request = self._request(SearchControls(*controls))
        uploads = [self._uploads.get(token) for token in tokens or ()]
        answers = [
            upload.image.exception() or self._service.submit(upload.image.result().view, request, number)
            for number, upload in enumerate(uploads)
        ]
        rows = []
        for upload, answer in zip(uploads, answers, strict=True):
            if isinstance(answer, BaseException):
                rows.append([upload.name, "", "", str(answer)])
            else:
                [found] = answer.result()
                rows.append([upload.name, found.caption, f"{found.log_prob:.4f}", ""])
        return rows, _csv_link(rows)

    def _request(self, chosen: SearchControls) -> GenerationRequest:
        search: dict[str, Any] = {"method": "beam", "groups": 1, "length_penalty": chosen.length_penalty}
        if chosen.method == "sample":
            search = {"method": "sample", "temperature": chosen.temperature, "top_p": chosen.top_p}
            search["seed"] = int(chosen.seed or 0)
        else:
            search["beam"] = int(chosen.beam) if chosen.method == "beam" else 1
        return self._service.pipeline.generation_request(**search)

    def _sample(self, item: int) -> PageState:
        assert self._samples is not None
        sample = self._samples.sample(item)
        image = decode_upload(self._service, self._samples.image(item), sample.file)
        return PageState(image.result(), sample.captions)


def _checked(index: int, count: int, what: str) -> int:
    if not 0 <= index < count:
        raise UserError(f"{what} {index}: not there, expected one of {count}; reload the page")
    return index


def _in_memory(state: PageState | None) -> PageState:
    if state is None:
        raise UserError("This page was idle for too long; drop the image again.")
    return state


def _square(image: DecodedImage, side: int) -> Image.Image:
    """Return the center square, which is what the model sees."""
    return Image.fromarray(center_crop(decode.decode_image(image.preview, "the preview"), side))


def _label(caption: CaptionResult) -> str:
    probability = float(np.exp(caption.log_prob))
    odds = percent(round(100 * probability))
    # A long caption's percentage rounds to zero.
    if probability <= 0.1:
        odds = f"1 in {float(f'{1 / max(probability, 1e-99):.1e}'):,.0f}"
    return f"{caption.caption or '(no word)'}  —  {odds}"


def percent(number: int) -> str:
    """Return a word's probability as the page shows it."""
    return f"{number} %"


def _shown(state: PageState) -> tuple[Any, ...]:
    """Return the chosen caption's words and the image."""
    percents = [percent(round(100 * each)) for each in state.caption.probabilities]
    return list(zip(state.caption.words, percents, strict=True)), _attention_html(state, None)


def _attention_html(state: PageState, word: int | None) -> str:
    """Return the image, with the attention of a word if there is one, and the image's references."""
    caption, image = state.caption, _square(state.image, PREVIEW_SIZE)
    maps = caption.attention_maps
    values: dict[str, Any] = {"has_attention": maps is not None, "word": None}
    if maps is not None and word is not None:
        image = overlay(image, maps[word], caption.max_attention)
        values |= {"word": caption.words[word], "percent": percent(round(100 * caption.probabilities[word]))}
        values["rows"], values["columns"] = maps[word].shape
    jpeg = base64_jpeg(image, quality=90)
    return render("demo_image.html", references=state.references, jpeg=jpeg, **values)


def _csv_link(rows: Sequence[Sequence[str]]) -> str:
    """Return a link that holds the table itself, so that no file is written."""
    out = io.StringIO(newline="")
    csv.writer(out).writerows([COLUMNS, *rows])
    data = base64.b64encode(out.getvalue().encode()).decode()
    return f'<a download="captions.csv" href="data:text/csv;charset=utf-8;base64,{data}">Download as CSV</a>'
