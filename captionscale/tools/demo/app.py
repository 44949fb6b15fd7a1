"""The demo's application: a run's endpoint with the page at its root."""

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI

from captionscale.config import Data
from captionscale.data.shards import Split
from captionscale.data.storage import LocalStorage, open_storage
from captionscale.errors import UserError
from captionscale.progress import say
from captionscale.tools.captioner_api import CaptionPipeline
from captionscale.tools.demo.endpoint import create_api
from captionscale.tools.demo.page import CSS, build_page
from captionscale.tools.demo.request_filter import restrict_gradio
from captionscale.tools.demo.service import Service
from captionscale.tools.demo.uploads import Uploads
from captionscale.tools.ensemble import open_ensemble


def open_app(
    run: Path, others: Sequence[Path], checkpoint: str, shards: str | None
) -> tuple[FastAPI, Service]:
    """Return a run's application and its service; the arguments are those of `serve`."""
    members = open_ensemble(run, others, checkpoint=checkpoint, overrides=[])
    service = Service(CaptionPipeline(members))
    return create_app(service, run.resolve().name, _samples(members.config.data, shards)), service


def create_app(service: Service, name: str, samples: Split | None) -> FastAPI:
    """Return the application.

    Args:
        service: Decodes and captions.
        name: The run's.
        samples: A split whose images the page offers.
    """
    app, uploads = create_api(service, name), Uploads(service)
    page = restrict_gradio(build_page(service, name, samples, uploads), uploads, service.limits, css=CSS)
    app.router.lifespan_context = page.router.lifespan_context
    app.mount("/", page)
    return app


def _samples(data: Data, shards: str | None) -> Split | None:
    try:
        place = open_storage(shards or data.shards, data.cache, data.cache_gb)
        if isinstance(place, LocalStorage):
            return Split(place, data.val_split)
        reason = f"{place} is not a folder on this machine"
    except UserError as error:
        reason = str(error)
    say(f"note: the page offers no sample images: {reason}; name a folder with --shards DIR")
    return None
