"""The demo's application: a run's endpoint, with a page at its root on which users try the run."""

import math
from typing import Any

import gradio as gr
from fastapi import FastAPI

from captionscale.data.shards import Split
from captionscale.data.storage import LocalStorage, open_storage
from captionscale.errors import UserError
from captionscale.escape import for_markdown, for_markdown_code
from captionscale.progress import say
from captionscale.tools.captioner_api import CaptionPipeline
from captionscale.tools.demo.endpoint import create_api, search_bounds
from captionscale.tools.demo.request_filter import restrict_gradio
from captionscale.tools.demo.service import MAX_BEAM, MAX_SAMPLES, Service
from captionscale.tools.demo.sessions import COLUMNS, PageHandlers, percent
from captionscale.tools.demo.uploads import Uploads
from captionscale.tools.ensemble import CheckpointEnsemble

_STATE_TTL_S = 3600
_METHODS = (
    ("greedy: the most likely word at each step", "greedy"),
    ("beam search: the best of many captions", "beam"),
    ("sampling: words drawn by their probability", "sample"),
)
_CSS = """
.gradio-container { width: 100% !important; max-width: min(1100px, 100vw) !important; margin: auto }
/* Errors are shown as text. */
.wrap > .error { display: none }
#image img { width: 100%; max-width: min(448px, 48vh); border-radius: 6px }
#samples .grid-wrap { min-height: 0 }
#samples .grid-container { grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)) !important }
/* Nothing to show yet. */
#words:has(.empty), .form:has(> #captions:not(:has(input))) { display: none }
#words [role=button] { cursor: pointer }
.dark #words [role=button] * { color: white !important }
/* Uploads are not kept. */
#files .download { visibility: hidden }
"""


def open_app(members: CheckpointEnsemble, name: str, shards: str | None) -> tuple[FastAPI, Service]:
    """Return the application of runs that caption together, and its service."""
    service, data = Service(CaptionPipeline(members)), members.config.data
    samples: Split | None = None
    try:
        place = open_storage(shards or data.shards, data.cache, data.cache_gb)
        if isinstance(place, LocalStorage):
            samples = Split(place, data.val_split)
        reason = f"{place} is not a folder on this machine"
    except UserError as error:
        reason = str(error)
    if samples is None:
        say(f"note: the page offers no sample images: {reason}; name a folder with --shards DIR")
    return create_app(service, name, samples), service


def create_app(service: Service, name: str, samples: Split | None) -> FastAPI:
    """Return the application of a run, whose page offers images of the split `samples`."""
    app, uploads = create_api(service, name), Uploads(service)
    page = restrict_gradio(_build_page(service, name, samples, uploads), uploads, service.limits, css=_CSS)
    app.router.lifespan_context = page.router.lifespan_context
    app.mount("/", page)
    return app


def _by_token(part: Any) -> Any:
    """Have an input pass on an upload's token: gradio opens no file.

    The class stays the same, as gradio writes a file next to each subclass.
    """
    part.data_model, part.preprocess = None, lambda payload: payload
    part.api_info = lambda: {"type": "string"}
    return part


def _build_page(service: Service, name: str, samples: Split | None, uploads: Uploads) -> gr.Blocks:
    """Return the page of a run; it offers images of the split `samples`."""
    handlers = PageHandlers(service, samples, uploads)
    # gradio's own files are deleted soon, and it reports nothing.
    with gr.Blocks(title=f"captionscale: {name}", analytics_enabled=False, delete_cache=(60, 300)) as blocks:
        gr.Markdown(
            f"# Captions by {for_markdown_code(name)}\nNothing that you upload is kept. Programs use"
            " [POST /caption](/docs)."
        )
        state = gr.State(None, time_to_live=_STATE_TTL_S)
        with gr.Tab("One image"), gr.Row():
            with gr.Column(min_width=280):
                sources = ["upload", "clipboard"]
                drop = gr.Image(
                    label="Drop an image", sources=sources, type="filepath", height=260, elem_id="drop"
                )
                upload = _by_token(drop)
                if samples:
                    gr.Markdown(f"or choose one of the split '{for_markdown(samples.name)}':")
                gallery = gr.Gallery(
                    handlers.thumbnails() or None,
                    show_label=False,
                    visible=samples is not None,
                    columns=4,
                    height="auto",
                    allow_preview=False,
                    buttons=[],
                    elem_id="samples",
                )
                controls, again = _search_controls(service)
            with gr.Column(min_width=280):
                # Above the image, so that both are in sight when a word is clicked.
                words = gr.HighlightedText(
                    label="Caption, with each word's probability: click a word to see its attention",
                    color_map={percent(number): _shade(number / 100) for number in range(101)},
                    elem_id="words",
                )
                image = gr.HTML("<p>The caption and the model's attention appear here.</p>", elem_id="image")
                captions = gr.Radio(
                    [],
                    label="All captions found, best first",
                    info="With each caption's probability. Longer captions are less probable; beam search"
                    " makes up for that by the length penalty.",
                    # gradio's default is a guess from the events that take its value, and none does.
                    interactive=True,
                    elem_id="captions",
                )
        with gr.Tab("Many images"):
            gr.Markdown(f"At most {service.limits.max_files} files, captioned with the first tab's settings.")
            files = _by_token(gr.File(file_count="multiple", label="Drop images", elem_id="files"))
            download = gr.HTML(elem_id="download")
            widths = ["18%", "30%", "24%", "28%"]
            table = gr.Dataframe(
                headers=list(COLUMNS), column_widths=widths, interactive=False, wrap=True, elem_id="table"
            )
        shown: list[Any] = [state, captions, words, image]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        # These wait for the model; the limit leaves threads to other events.
        slow = {**private, "concurrency_id": "model", "concurrency_limit": 8}
        upload.input(handlers.on_upload, [upload, *controls], shown, **slow)
        # Of choices made while one is pending, gradio's default drops all; this keeps the last.
        last: dict[str, Any] = {"trigger_mode": "always_last"}
        gallery.select(handlers.on_sample_select, controls, shown, **slow, **last)
        again.click(handlers.caption, [state, *controls], shown, **slow)
        controls[0].change(handlers.caption, [state, *controls], shown, **slow)
        files.upload(handlers.on_files, [files, *controls], [table, download], **slow)
        captions.select(handlers.on_caption_select, state, [state, words, image], **private, **last)
        words.select(handlers.on_word_select, state, image, **private, **last)
        blocks.queue(default_concurrency_limit=8, max_size=service.limits.max_requests)
    return blocks


def _shade(probability: float) -> str:
    """Return a color for white text, darker for a higher probability; hue carries no information."""
    pale, deep = (122, 144, 168), (12, 58, 110)
    red, green, blue = (round(a + (b - a) * probability) for a, b in zip(pale, deep, strict=True))
    return f"rgb({red}, {green}, {blue})"


def _search_controls(service: Service) -> tuple[list[Any], gr.Button]:
    """Return the controls in the order of `SearchControls`, and the button."""
    search = service.pipeline.ensemble.config.search
    method = gr.Radio(list(_METHODS), value="beam", label="Search", elem_id="method")
    with gr.Group() as beam_group:
        beam = _slider("beam", "Beam size", min(search.beam, MAX_BEAM), 1, MAX_BEAM)
        hint = "Length penalty: the higher, the longer"
        length = _slider("length_penalty", hint, search.length_penalty, 0.1)
    with gr.Group(visible=False) as sample_group:
        samples = gr.Slider(1, MAX_SAMPLES, 5, step=1, label="Samples")
        bounds = search_bounds("temperature")
        hint = "Temperature: below 1, likely words get likelier"
        temperature = gr.Number(1, minimum=bounds["ge"], maximum=bounds["le"], step=0.1, label=hint)
        top_p = _slider("top_p", "Top-p: total probability of the words sampled from", 1, 0.05)
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")

    def show_options(method: str) -> tuple[gr.Group, gr.Group]:
        return gr.Group(visible=method == "beam"), gr.Group(visible=method == "sample")

    method.change(show_options, method, [beam_group, sample_group], api_visibility="private")
    again = gr.Button("Caption again", elem_id="again")
    return [method, beam, length, samples, temperature, top_p, seed], again


def _slider(key: str, label: str, value: Any, step: Any, maximum: Any = math.inf) -> gr.Slider:
    """Return a slider within the bounds of a search option."""
    bounds = search_bounds(key)
    return gr.Slider(bounds.get("ge", step), min(bounds["le"], maximum), value, step=step, label=label)
