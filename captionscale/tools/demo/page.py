"""How the page looks on which people try a run."""

from typing import Any

import gradio as gr

from captionscale.data.shards import Split
from captionscale.escape import for_markdown, for_markdown_code
from captionscale.tools.demo.service import Service
from captionscale.tools.demo.sessions import COLUMNS, METHODS, PageHandlers, percent
from captionscale.tools.demo.uploads import Uploads

SAMPLES = 8
_MOST_BEAMS = 10
_MOST_DRAWS = 10
_KEPT_S = 3600
_WELCOME = (
    "<p>Here comes what the model says of your picture, how sure it was of each word, and where it looked for"
    " it.</p>"
)
CSS = """
.gradio-container { width: 100% !important; max-width: min(1100px, 100vw) !important; margin: auto }
/* What is wrong is told beside it, in words. */
.wrap > .error { display: none }
#looked img { width: 100%; max-width: min(448px, 48vh); border-radius: 6px }
/* Nothing to see yet. */
#words:has(.empty), .form:has(> #captions:not(:has(input))) { display: none }
#words [role=button] { cursor: pointer }
/* These would offer uploads again, which are gone. */
#files .download { visibility: hidden }
"""


def _by_name(place: Any) -> Any:
    """Have a place for uploads pass on their names, by which `Uploads` knows them: gradio opens no file.

    The class stays, as gradio writes a file beside each subclass.
    """
    place.data_model, place.preprocess = None, lambda payload: payload
    place.api_info = lambda: {"type": "string"}
    return place


def build_page(service: Service, name: str, samples: Split | None, uploads: Uploads) -> gr.Blocks:
    """Return the page.

    Args:
        service: Decodes and captions.
        name: Of the run.
        samples: A split of which some pictures are offered.
        uploads: What the page receives.
    """
    visits = PageHandlers(service, samples, SAMPLES, uploads)
    # Files that gradio writes are removed soon, and nobody is told that this page was opened.
    with gr.Blocks(title=f"captionscale: {name}", analytics_enabled=False, delete_cache=(60, 300)) as blocks:
        gr.Markdown(
            f"# What does {for_markdown_code(name)} say of a picture, and where does it look?\nWhat you drop"
            " is forgotten when you leave. Programs ask [POST /caption](/docs)."
        )
        seen = gr.State(None, time_to_live=_KEPT_S)
        with gr.Tab("One picture"), gr.Row():
            with gr.Column():
                drop = _by_name(
                    gr.Image(
                        label="Drop a picture",
                        sources=["upload", "clipboard"],
                        type="filepath",
                        height=260,
                        elem_id="drop",
                    )
                )
                if samples:
                    gr.Markdown(f"or take one of the split '{for_markdown(samples.name)}':")
                gallery = gr.Gallery(
                    visits.thumbnails() or None,
                    show_label=False,
                    visible=samples is not None,
                    columns=4,
                    height=260,
                    allow_preview=False,
                    buttons=[],
                    elem_id="samples",
                )
                settings, again = _settings(service)
            with gr.Column():
                # The picture stays in sight of the words that are clicked.
                words = gr.HighlightedText(
                    label="Its caption, and how likely it found each word: click one to see where it looked",
                    color_map={percent(number): _shade(number / 100) for number in range(101)},
                    elem_id="words",
                )
                looked = gr.HTML(_WELCOME, elem_id="looked")
                captions = gr.Radio(
                    [],
                    label="All captions that were found, the best first",
                    info="Each with how often the model would say just these words if it drew them. The more"
                    " words, the rarer, for which a search makes up by their number (length power).",
                    # Otherwise gradio does not let it be used, as no event takes its value.
                    interactive=True,
                    elem_id="captions",
                )
        with gr.Tab("Many pictures"):
            gr.Markdown(
                f"At most {service.limits.max_files} files, captioned as the first tab's settings say."
            )
            files = _by_name(gr.File(file_count="multiple", label="Drop pictures", elem_id="files"))
            download = gr.HTML(elem_id="download")
            table = gr.Dataframe(
                headers=list(COLUMNS),
                column_widths=["20%", "35%", "10%", "35%"],
                interactive=False,
                wrap=True,
                elem_id="table",
            )
        outcome: list[Any] = [seen, captions, words, looked]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        # These wait for the model: together they leave threads to all else that is answered.
        slow = {**private, "concurrency_id": "model", "concurrency_limit": 8}
        drop.input(visits.on_upload, [drop, *settings], outcome, **slow)
        gallery.select(visits.on_sample_select, settings, outcome, **slow)
        again.click(visits.caption, [seen, *settings], outcome, **slow)
        settings[0].change(visits.caption, [seen, *settings], outcome, **slow)
        files.upload(visits.on_files, [files, *settings], [table, download], **slow)
        captions.select(visits.on_caption_select, seen, [seen, words, looked], **private)
        words.select(visits.on_word_select, seen, looked, **private)
        blocks.queue(default_concurrency_limit=8, max_size=service.limits.max_requests)
    return blocks


def _shade(probability: float) -> str:
    """Return one hue for white letters, the darker the likelier: it reads the same without colour vision."""
    pale, deep = (122, 144, 168), (12, 58, 110)
    red, green, blue = (round(a + (b - a) * probability) for a, b in zip(pale, deep, strict=True))
    return f"rgb({red}, {green}, {blue})"


def _settings(service: Service) -> tuple[list[Any], gr.Button]:
    """Return the controls that say how captions are found, in the order of `SearchControls`, and the button."""
    search = service.pipeline.ensemble.config.search
    labels = (
        "greedy: the likeliest word each time",
        "beam: the likeliest of many captions",
        "sampling: drawn as likely as the model finds them",
    )
    how = gr.Radio(list(zip(labels, METHODS, strict=True)), value="beam", label="How", elem_id="how")
    with gr.Group() as of_beams:
        width = min(max(search.beam, 2), _MOST_BEAMS)
        beam = gr.Slider(2, _MOST_BEAMS, width, step=1, label="Captions kept at each word")
        power = min(search.length_penalty, 2)
        length = gr.Slider(0, 2, power, step=0.1, label="Length power: the higher, the longer")
    with gr.Group(visible=False) as of_samples:
        draws = gr.Slider(1, _MOST_DRAWS, 5, step=1, label="Captions drawn")
        heat = gr.Slider(0.1, 2, 1, step=0.1, label="Temperature: below 1, likely words get likelier")
        top_p = gr.Slider(
            0.05, 1, 1, step=0.05, label="Top-p: only words that together have this probability"
        )
        seed = gr.Number(0, precision=0, minimum=0, label="Seed: another one draws others")
    how.change(
        lambda how: (gr.Group(visible=how == "beam"), gr.Group(visible=how == "sampling")),
        how,
        [of_beams, of_samples],
        api_visibility="private",
    )
    return [how, beam, length, draws, heat, top_p, seed], gr.Button("Caption again", elem_id="again")
