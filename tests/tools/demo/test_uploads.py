import asyncio
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from experiment import peaked_run
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image

import captionscale
from captionscale.data import decode
from captionscale.errors import UserError
from captionscale.tools.demo.request_body import RequestError, chunks
from captionscale.tools.demo.service import Limits, Service
from captionscale.tools.demo.uploads import Uploads

LIMITS = Limits(max_file_bytes=100_000, max_files=5, max_uploads=7)


@pytest.fixture(scope="module")
def service(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(captionscale.load(peaked_run(tmp_path_factory.mktemp("run"), packed)), LIMITS)
    yield service
    service.close()


@pytest.fixture
def uploads(service: Service) -> Uploads:
    return Uploads(service)


def send(uploads: Uploads, *files: tuple[str, bytes]) -> list[str]:
    """Send files as the page does; return their tokens."""
    app = FastAPI()

    @app.post("/upload")
    async def upload(request: Request):
        try:
            body = chunks(request.receive, Limits().min_rate)
            return JSONResponse(await uploads.receive(request.headers["content-type"], body))
        except RequestError as error:
            return PlainTextResponse(str(error), error.status)

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.post("/upload", files=[("files", (name, data)) for name, data in files])

    answer = asyncio.run(post())
    if answer.status_code != 200:
        raise RequestError(413, answer.text)
    return answer.json()


def test_an_upload_is_kept_as_the_model_s_view_and_a_preview(
    service: Service, uploads: Uploads, synthetic_coco: Path
) -> None:
    file = next((synthetic_coco / "test2017").iterdir())
    wide_png = io.BytesIO()
    Image.new("RGB", (9000, 10), "red").save(wide_png, "PNG")
    first, second, third = send(
        uploads, (f"../a/{file.name}", file.read_bytes()), ("w.png", wide_png.getvalue()), ("no.txt", b"text")
    )
    upload = uploads.get(first)
    assert upload.name == file.name
    image, thin = upload.image.result(), uploads.get(second).image.result()
    assert (image.view == service.pipeline.view(file)).all()
    assert decode.decode_image(image.preview, "").shape == decode.read_image(file).shape
    assert decode.decode_image(thin.preview, "").shape == (10, 40, 3)
    with pytest.raises(UserError, match=r"no\.txt: not a readable image"):
        uploads.get(third).image.result()
    with pytest.raises(UserError, match="not there, expected an image dropped"):
        uploads.get(str(file))


def test_too_many_or_too_large_files_are_refused_while_they_are_received(uploads: Uploads) -> None:
    with pytest.raises(RequestError, match="more than 5 files"):
        send(uploads, *[("a", b"x")] * 6)
    with pytest.raises(RequestError, match="expected at most 100,000"):
        send(uploads, ("a", bytes(100_001)))


def test_the_oldest_uploads_are_removed_first(uploads: Uploads) -> None:
    tokens = [token for _ in range(2) for token in send(uploads, *[("a", b"x")] * 5)]
    for token in tokens[-7:]:
        uploads.get(token)
    for token in tokens[:-7]:
        with pytest.raises(UserError, match="not there"):
            uploads.get(token)
