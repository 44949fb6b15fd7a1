import asyncio
from pathlib import Path

import httpx
from fastapi import FastAPI

from captionscale.tools.demo.uploads import BoundedUploads


def test_uploads_that_are_not_read_fill_the_disk_no_further_than_they_may(tmp_path: Path) -> None:
    app = FastAPI()
    for path in ("/gradio_api/upload", "/caption"):
        app.post(path)(lambda: "done")
    app.add_middleware(BoundedUploads, folder=tmp_path, most_bytes=10_000)

    def ask(path: str) -> int:
        async def send() -> httpx.Response:
            here = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=here, base_url="http://here") as client:
                return await client.post(path)

        return asyncio.run(send()).status_code

    assert ask("/gradio_api/upload") == 200
    left = tmp_path / "3f2a" / "photo.jpg"
    left.parent.mkdir()
    left.write_bytes(bytes(20_000))
    assert ask("/gradio_api/upload") == 503
    assert ask("/caption") == 200
    left.unlink()
    assert ask("/gradio_api/upload") == 200
