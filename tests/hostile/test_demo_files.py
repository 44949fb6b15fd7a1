"""No request makes the demo open a file or a URL, on any route, for any input of any event."""

import asyncio
import http.server
import json
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_server import serve_app, use_cache
from experiment import peaked_run

import captionscale
from captionscale.data.shards import Split
from captionscale.tools.demo.service import Limits, Service

# gradio warns of its own calls and defaults.
pytestmark = pytest.mark.filterwarnings("ignore")

MARK = f"private-{uuid.uuid4().hex}"
OPENED: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        OPENED.append(str(arguments[0]))


class Canary:
    """What an attack is after: a file, and a web server that must get no request."""

    def __init__(self, folder: Path):
        self.file = folder / "private.jpg"
        self.file.write_text(MARK, encoding="utf-8")
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(MARK.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/private.jpg"

    def places(self) -> list[str]:
        return [
            str(self.file),
            f"../../../../../../../../../..{self.file}",
            f"file://{self.file}",
            self.url,
            "/dev/zero",
            "/proc/self/environ",
        ]

    def assert_untouched(self, cache: Path, before: set[Path]) -> None:
        touched = [
            path for path in OPENED if self.file.name in path or path in ("/dev/zero", "/proc/self/environ")
        ]
        assert touched == []
        assert self.asked == []
        assert set(cache.rglob("*")) == before
        assert self.file.read_text(encoding="utf-8") == MARK


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        use_cache(patch, folder)
        yield folder


@pytest.fixture(scope="module", autouse=True)
def opened_files() -> None:
    # A hook stays as long as the process does, and slows it down.
    sys.addaudithook(_note)


@pytest.fixture(scope="module", autouse=True)
def event_loops() -> Iterator[None]:
    """Close the event loops that gradio makes and never closes: collected later, they fail another test."""
    made, make = [], asyncio.new_event_loop

    def recorded() -> asyncio.AbstractEventLoop:
        made.append(make())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", recorded)
        yield
    asyncio.set_event_loop(None)
    for loop in made:
        loop.close()


@pytest.fixture(scope="module")
def service(
    packed: Path,
    cache: Path,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    service = Service(captionscale.load(peaked_run(tmp_path_factory.mktemp("run"), packed)), Limits())
    yield service
    service.close()


@pytest.fixture(scope="module")
def page(service: Service, packed: Path) -> Iterator[str]:
    from captionscale.tools.demo.page import create_app

    with serve_app(create_app(service, "tiny", Split(packed, "val"))) as url:
        yield url


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canary]:
    canary = Canary(tmp_path_factory.mktemp("private"))
    yield canary
    canary.server.shutdown()
    canary.server.server_close()


def forged(place: str) -> list[Any]:
    """Return what gradio may take for a file, in many spellings."""
    file: dict[str, Any] = {"path": place, "meta": {"_type": "gradio.FileData"}}
    url = {**file, "path": "upload.jpg", "url": place}
    return [
        place,
        file,
        {"path": place},
        {**file, "is_stream": True},
        {**file, "orig_name": "a.jpg", "mime_type": "image/jpeg", "size": 1},
        url,
        {"url": place, "meta": {"_type": "gradio.FileData"}},
        [file],
        [url, file],
        [[file, "caption"]],
        [{"image": file, "caption": None}],
        [{"video": file, "caption": None}],
        {"image": file},
        {"background": file, "layers": [file], "composite": file},
        {"text": "", "files": [file]},
        {"video": file, "subtitles": file},
        {"value": file},
        {"data": [[file]], "headers": ["a"]},
        {"__type__": "update", "value": file},
        [{"role": "user", "content": [{"type": "file", "file": file}]}],
    ]


def attack(url: str, canary: Canary, *, all_pairs: bool) -> tuple[int, int]:
    """Send forgeries as every input of every event; return how many were refused, and how many ran.

    Args:
        url: Of the page.
        canary: What they are after.
        all_pairs: Send each spelling of each place as the first input of each component. Otherwise, and as
            other inputs, send each spelling of one place, which is another one for the next spelling and for
            the next input.
    """
    OPENED.clear()
    refused = ran = inputs = 0
    attacked: set[int] = set()
    with httpx.Client(base_url=url, timeout=600, verify=False) as client:
        config = client.get("/config").json()
        parts = {part["id"]: part for part in config["components"]}
        for event in config["dependencies"]:
            honest = [parts[each]["props"].get("value") for each in event["inputs"]]
            honest = [None if isinstance(value, dict | list) else value for value in honest]
            for place in range(len(honest)):
                by_place = [forged(at) for at in canary.places()]
                inputs += 1
                pairs = [
                    by_place[(inputs + spelling) % len(by_place)][spelling]
                    for spelling in range(len(by_place[0]))
                ]
                first = event["inputs"][place] not in attacked
                attacked.add(event["inputs"][place])
                for forgery in chain(*by_place) if all_pairs and first else pairs:
                    data = [*honest[:place], forgery, *honest[place + 1 :]]
                    body = {
                        "data": data,
                        "fn_index": event["id"],
                        "event_data": {"index": 0, "value": forgery},
                    }
                    answer = client.post("/gradio_api/queue/join", json={**body, "session_hash": "evil"})
                    assert MARK not in answer.text
                    if answer.status_code == 200:
                        ran += 1
                        said = client.get("/gradio_api/queue/data", params={"session_hash": "evil"}).text
                        assert "process_completed" in said
                        assert MARK not in said
                    else:
                        assert answer.status_code in (400, 404), answer.text
                        refused += 1
    return refused, ran


def test_no_input_of_any_event_of_the_page_opens_what_a_request_names(
    page: str, canary: Canary, cache: Path
) -> None:
    before = set(cache.rglob("*"))
    refused, ran = attack(page, canary, all_pairs=True)
    canary.assert_untouched(cache, before)
    # No input of the page takes text.
    assert refused > 1000
    assert ran == 0


def test_no_input_of_any_component_that_a_page_may_have_opens_what_a_request_names(
    service: Service, canary: Canary, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import gradio as gr
    from fastapi import FastAPI

    from captionscale.tools.demo.request_filter import restrict_gradio
    from captionscale.tools.demo.uploads import Uploads

    kinds = {
        each
        for each in vars(gr).values()
        if isinstance(each, type) and issubclass(each, gr.components.Component)
    }
    with gr.Blocks(analytics_enabled=False) as blocks:
        shown, count = gr.JSON(), 0
        for kind in sorted(kinds, key=lambda each: each.__name__):
            # They list files by design, need an account, or take nothing from a request.
            if kind in (gr.FileExplorer, gr.LoginButton, gr.State, gr.Timer) or kind.__name__ == "Component":
                continue
            try:
                part = kind()
            # Others need arguments.
            except TypeError:
                continue
            gr.Button().click(lambda value: repr(value), part, shown)
            count += 1
    assert count > 25
    app = FastAPI()
    restricted = restrict_gradio(blocks, Uploads(service), service.limits)
    app.router.lifespan_context = restricted.router.lifespan_context
    app.mount("/", restricted)
    before = set(cache.rglob("*"))
    with serve_app(app) as url:
        refused, ran = attack(url, canary, all_pairs=False)
    canary.assert_untouched(cache, before)
    assert refused > 10 * ran > 0
    capfd.readouterr()


def routes(app: Any) -> Iterator[tuple[str, str]]:
    """Yield method and path of every route of an application and of those mounted in it."""
    for route in app.routes:
        for method in getattr(route, "methods", None) or ():
            yield method, route.path
        inner = getattr(route, "original_router", getattr(route, "app", None))
        if hasattr(inner, "routes"):
            yield from routes(inner)


def test_no_route_of_gradio_opens_what_a_request_names(page: str, canary: Canary, cache: Path) -> None:
    import gradio as gr
    from gradio.routes import App

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Textbox()
    found = {*routes(App.create_app(blocks)), ("GET", "/static-offline-docs/{path:path}")}
    assert len(found) > 60
    known = {path for _, path in found}
    assert {"/gradio_api/file={path_or_url:path}", "/gradio_api/proxy={url_path:path}"} <= known
    OPENED.clear()
    before, answered = set(cache.rglob("*")), set()
    with httpx.Client(base_url=page, timeout=600, verify=False) as client:
        for method, path in sorted(found):
            for place in canary.places():
                target = re.sub(r"{.*?}", place.replace("#", "%23"), path)
                query = dict.fromkeys(
                    ("path", "url", "deep_link", "session_hash", "upload_id", "page"), place
                )
                body = {"data": forged(place)[1], "component_id": 1, "session_hash": "evil", "fn_name": "ls"}
                if "heartbeat" in path or "queue/data" in path:
                    continue
                answer = client.request(method, target, params=query, content=json.dumps(body))
                assert MARK not in answer.text
                if answer.status_code < 400 and place not in ("/dev/zero",):
                    answered.add((method, path))
    canary.assert_untouched(cache, before)
    # Nothing else is answered than what the page needs.
    assert {path for _, path in answered} <= {
        "/",
        "/config",
        "/openapi.json",
        "/theme.css",
        "/favicon.ico",
        "/manifest.json",
        "/gradio_api/upload_progress",
    }


def test_gradio_own_check_of_paths_is_on(service: Service) -> None:
    import gradio as gr
    from gradio.context import LocalContext
    from gradio.exceptions import InvalidPathError
    from gradio.processing_utils import _check_allowed

    from captionscale.tools.demo.request_filter import restrict_gradio
    from captionscale.tools.demo.uploads import Uploads

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Textbox()
    restrict_gradio(blocks, Uploads(service), service.limits)
    token = LocalContext.blocks.set(blocks)
    try:
        with pytest.raises(InvalidPathError):
            _check_allowed("/etc/passwd", True)
    finally:
        LocalContext.blocks.reset(token)


@pytest.fixture
def upload(page: str) -> Callable[[bytes], str]:
    def send(data: bytes) -> str:
        [name] = httpx.post(
            f"{page}/gradio_api/upload", files={"files": ("a.jpg", data)}, timeout=600, verify=False
        ).json()
        return str(name)

    return send


def test_an_upload_is_found_by_its_token_and_never_as_a_file(
    page: str, synthetic_coco: Path, cache: Path, upload: Callable[[bytes], str]
) -> None:
    before = set(cache.rglob("*"))
    first, second = (
        upload(file.read_bytes()) for file in sorted((synthetic_coco / "test2017").iterdir())[:2]
    )
    assert first != second
    assert httpx.get(f"{page}/gradio_api/file={first}", verify=False).headers["content-type"] == "image/jpeg"
    for guess in (first[:-5] + ".jpg", f"./{first}", f"x/../{first}", first.upper(), ""):
        assert httpx.get(f"{page}/gradio_api/file={guess}", verify=False).status_code == 404
    assert set(cache.rglob("*")) == before


def test_a_value_that_the_page_does_not_offer_is_refused_without_a_traceback(
    page: str, synthetic_coco: Path, upload: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]
) -> None:
    photo = next((synthetic_coco / "test2017").iterdir()).read_bytes()
    with httpx.Client(base_url=page, timeout=600, verify=False) as client:
        config = client.get("/config").json()
        parts = {part["id"]: part for part in config["components"]}
        statuses = []
        for event in config["dependencies"]:
            kinds = [parts[each]["type"] for each in event["inputs"]]
            honest: list[Any] = [
                {"path": upload(photo)} if kind == "image" else parts[each]["props"].get("value")
                for each, kind in zip(event["inputs"], kinds, strict=True)
            ]
            for index in (None, -1, 10**9, 0):
                clicked = None if index is None else {"index": index}
                trials = [honest]
                for place, kind in enumerate(kinds):
                    bad = {"image": 1, "file": [1], "state": 1}.get(kind, "bad")
                    trials += [[*honest[:place], each, *honest[place + 1 :]] for each in (bad, 10**12, True)]
                for data in trials:
                    body = {
                        "data": data,
                        "fn_index": event["id"],
                        "session_hash": "odd",
                        "event_data": clicked,
                    }
                    answer = client.post("/gradio_api/queue/join", json=body)
                    statuses.append(answer.status_code)
                    if answer.status_code == 200:
                        said = client.get("/gradio_api/queue/data", params={"session_hash": "odd"}).text
                        assert "process_completed" in said
                        assert '"error": null' not in said
                    else:
                        assert "expected" in answer.json()["detail"]
    assert set(statuses) == {200, 400}
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("body", [b"no form", b"--X\r\n\r\n\r\n" * 200])
def test_a_damaged_form_that_is_received_is_answered_at_once(page: str, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=X"}
    # Shorter than the server reads on for.
    answer = httpx.post(
        f"{page}/gradio_api/upload",
        content=body,
        headers=headers,
        timeout=Limits().min_rate.grace_s / 2,
        verify=False,
    )
    assert answer.status_code in (400, 413)
