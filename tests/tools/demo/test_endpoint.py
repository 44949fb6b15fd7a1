import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn
from experiment import peaked_run
from PIL import Image

import captionscale
from captionscale.tools.captioner_api import CaptionPipeline
from captionscale.tools.demo.endpoint import create_api
from captionscale.tools.demo.service import BusyError, Limits, Service

LIMITS = Limits(max_file_bytes=200_000, max_pixels=1_000_000, max_batch_size=8, max_queue_delay_s=0.05)
JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def writer(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptionPipeline:
    return captionscale.load(peaked_run(tmp_path_factory.mktemp("endpoint"), packed))


class Counting(CaptionPipeline):
    """A writer that knows how large its batches were."""

    batches: list[int]

    def generate(self, views, *arguments, **keywords):
        self.batches.append(len(views))
        return super().generate(views, *arguments, **keywords)


@pytest.fixture
def counting(writer: CaptionPipeline) -> Counting:
    counted = Counting(writer.ensemble)
    counted.batches = []
    return counted


@pytest.fixture
def url(counting: Counting) -> Iterator[str]:
    service = Service(counting, LIMITS)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(create_api(service, "tiny"), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()
    service.close()


def test_fifty_at_once_with_bad_ones_among_them_each_have_their_own_answer(
    url: str, counting: Counting, synthetic_coco: Path
) -> None:
    files = sorted(
        path for split in ("train", "test") for path in (synthetic_coco / f"{split}2017").iterdir()
    )[:40]
    alone = [counting.caption([file], beam=3)[0] for file in files]
    counting.batches.clear()
    huge = io.BytesIO()
    Image.new("1", (1001, 1000)).save(huge, "PNG")
    bad = [
        (b"", JPEG, 422, "not a readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", JPEG, 422, "not a readable image"),
        (b"<svg/>", {"Content-Type": "image/svg+xml"}, 415, "found image/svg+xml, wanted image/jpeg"),
        (files[0].read_bytes()[:500], JPEG, 422, "not a readable image"),
        (
            huge.getvalue(),
            {"Content-Type": "image/png"},
            422,
            "1,001,000 pixels, wanted at most 1,000,000",
        ),
        (bytes(200_001), JPEG, 413, "wanted at most 200,000"),
    ]
    good = [(file.read_bytes(), JPEG, 200, "") for file in files]
    requests = [*good[:20], *bad, *good[20:], *bad[:4]]
    assert len(requests) == 50

    def ask(request: tuple[bytes, dict[str, str], int, str]) -> httpx.Response:
        return httpx.post(
            f"{url}/caption", content=request[0], headers=request[1], params={"beam": 3}, timeout=300
        )

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, requests))
    expected = iter(alone)
    for (_, _, status, told), answer in zip(requests, answers, strict=True):
        assert answer.status_code == status, answer.text
        if status == 200:
            caption = next(expected)
            assert answer.json()["caption"] == caption.caption
            assert [word["word"] for word in answer.json()["words"]] == caption.words
            assert answer.json()["log_prob"] == pytest.approx(caption.log_prob, abs=1e-3)
        else:
            assert told in answer.json()["error"]
    assert sum(counting.batches) == 40
    # They were captioned together, and never more than the limit at once.
    assert len(counting.batches) < 40
    assert max(counting.batches) <= LIMITS.batch


def test_who_asks_by_get_is_told_how_to_ask(url: str) -> None:
    answer = httpx.get(f"{url}/caption", timeout=60)
    assert answer.status_code == 405
    assert "wanted POST" in answer.json()["error"]


def test_a_sampled_caption_is_that_of_its_seed_whoever_shares_the_batch(
    url: str, synthetic_coco: Path
) -> None:
    data = sorted((synthetic_coco / "test2017").iterdir())[0].read_bytes()
    seeds = [1, 2, 1, 3, 1]

    # Words alone: what shares the batch changes the rounding, and so the last digits of probabilities.
    def ask(seed: int) -> str:
        params = {"method": "sample", "seed": seed}
        answer = httpx.post(f"{url}/caption", content=data, headers=JPEG, params=params, timeout=300).json()
        return str(answer["caption"])

    with ThreadPoolExecutor(5) as pool:
        first, second, again, third, last = pool.map(ask, seeds)
    assert first == again == last
    assert len({first, second, third}) > 1


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("beam=0", "beam=0: input should be greater than or equal to 1; see /docs"),
        ("beam=99", "beam=99: input should be less than or equal to 20; see /docs"),
        ("baem=3", "baem=3: extra inputs are not permitted; see /docs"),
        ("prefix=zebrafish", "the run has no word 'zebrafish'"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    url: str, synthetic_coco: Path, query: str, told: str
) -> None:
    data = next((synthetic_coco / "test2017").iterdir()).read_bytes()
    answer = httpx.post(f"{url}/caption?{query}", content=data, headers=JPEG, timeout=300)
    assert answer.status_code == 422
    assert told in answer.json()["error"]


def test_a_body_that_does_not_say_how_long_it_is_is_cut_off_at_the_limit(url: str) -> None:
    answer = httpx.post(f"{url}/caption", content=iter([bytes(150_000)] * 2), headers=JPEG, timeout=300)
    assert answer.status_code == 413


def test_when_as_many_wait_as_may_the_next_is_told_when_to_come_again(writer: CaptionPipeline) -> None:
    service = Service(writer, Limits(max_requests=1))
    app = create_api(service, "tiny")
    with service.admit():
        with pytest.raises(BusyError, match="1 requests are waiting, wanted at most 1"), service.admit():
            pass

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://here"
            ) as client:
                return await client.post("/caption", content=b"", headers=JPEG)

        import asyncio

        answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    with service.admit():
        pass
    service.close()


def test_an_error_in_a_batch_is_told_to_all_in_it_and_the_next_are_served(
    writer: CaptionPipeline, synthetic_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, view = Service(writer, LIMITS), writer.view(next((synthetic_coco / "test2017").iterdir()))
    real, calls = writer.generate, []

    def generate(*arguments, **keywords):
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise MemoryError("no room")
        return real(*arguments, **keywords)

    monkeypatch.setattr(writer, "generate", generate)
    both = [service.submit(view, writer.generation_request(), 0) for _ in range(2)]
    for answer in both:
        with pytest.raises(MemoryError, match="no room"):
            answer.result(60)
    assert (
        service.submit(view, writer.generation_request()).result(60)[0].words
        == real([view], writer.generation_request(), [0])[0][0].words
    )
    service.close()


def test_the_manual_says_what_openapi_says_and_loads_nothing_from_elsewhere(url: str) -> None:
    described = httpx.get(f"{url}/openapi.json").json()
    page = httpx.get(f"{url}/docs").text
    operation = described["paths"]["/caption"]["post"]
    for option in operation["parameters"]:
        assert f"<code>{option['name']}</code>" in page
    for status in operation["responses"]:
        assert f"<td>{status}</td>" in page
    assert operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "ErrorResponse"
    )
    assert "<script" not in page
    assert not [word for word in page.split('"') if word.startswith("http") and not word.startswith(url)]
    assert json.dumps(described).count("Search") == 0
