import asyncio
import io
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from demo_server import serve_app
from experiment import peaked_run
from PIL import Image

import captionscale
from captionscale.tools.captioner_api import CaptionPipeline
from captionscale.tools.demo.endpoint import create_api
from captionscale.tools.demo.request_body import RequestError
from captionscale.tools.demo.service import Limits, Service

LIMITS = Limits(max_file_bytes=200_000, max_pixels=1_000_000, max_batch_size=8, max_queue_delay_s=0.05)
JPEG = {"Content-Type": "image/jpeg"}


class Counting(CaptionPipeline):
    """A pipeline that records the sizes of its batches."""

    batches: list[int]

    def generate(self, views, *arguments, **keywords):
        self.batches.append(len(views))
        return super().generate(views, *arguments, **keywords)


@pytest.fixture(scope="module")
def pipeline(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Counting:
    run = peaked_run(tmp_path_factory.mktemp("endpoint"), packed)
    pipeline = Counting(captionscale.load(run).ensemble)
    pipeline.batches = []
    return pipeline


@pytest.fixture(scope="module")
def url(pipeline: Counting) -> Iterator[str]:
    service = Service(pipeline, LIMITS)
    with serve_app(create_api(service, "<script>alert()</script>")) as url:
        yield url
    service.close()


@pytest.fixture(scope="module")
def image(synthetic_coco: Path) -> bytes:
    return sorted((synthetic_coco / "test2017").iterdir())[0].read_bytes()


def post(url: str, data: bytes, headers: dict[str, str] = JPEG, **params: str | int) -> httpx.Response:
    return httpx.post(
        f"{url}/caption", content=data, headers=headers, params=params, timeout=300, verify=False
    )


def test_fifty_concurrent_requests_some_of_them_invalid_each_get_their_own_answer(
    url: str, pipeline: Counting, synthetic_coco: Path
) -> None:
    files = sorted(
        path for split in ("train", "test") for path in (synthetic_coco / f"{split}2017").iterdir()
    )[:40]
    alone = [pipeline.caption([file], beam=3)[0] for file in files]
    pipeline.batches.clear()
    large = io.BytesIO()
    Image.new("1", (1001, 1000)).save(large, "PNG")
    invalid = [
        (b"", JPEG, 422, "not a readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", JPEG, 422, "not a readable image"),
        (b"<svg/>", {"Content-Type": "image/svg+xml"}, 415, "found image/svg+xml, expected image/jpeg"),
        (files[0].read_bytes()[:500], JPEG, 422, "not a readable image"),
        (
            large.getvalue(),
            {"Content-Type": "image/png"},
            422,
            "1,001,000 pixels, expected at most 1,000,000",
        ),
        (bytes(200_001), JPEG, 413, "expected at most 200,000"),
    ]
    valid = [(file.read_bytes(), JPEG, 200, "") for file in files]
    requests = [*valid[:20], *invalid, *valid[20:], *invalid[:4]]
    assert len(requests) == 50

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda each: post(url, each[0], each[1], beam=3), requests))
    expected = iter(alone)
    for (_, _, status, error), answer in zip(requests, answers, strict=True):
        assert answer.status_code == status, answer.text
        if status == 200:
            caption = next(expected)
            assert answer.json()["caption"] == caption.caption
            assert [word["word"] for word in answer.json()["words"]] == caption.words
            assert answer.json()["log_prob"] == pytest.approx(caption.log_prob, abs=1e-3)
        else:
            assert error in answer.json()["error"]
    assert sum(pipeline.batches) == 40
    # They were captioned together, and never more than the limit at once.
    assert len(pipeline.batches) < 40
    assert max(pipeline.batches) <= LIMITS.max_batch_size


def test_get_is_refused_with_the_method_to_use(url: str) -> None:
    answer = httpx.get(f"{url}/caption", timeout=600, verify=False)
    assert answer.status_code == 405
    assert "expected POST" in answer.json()["error"]


def test_a_sampled_caption_depends_on_its_seed_and_not_on_its_batch(url: str, image: bytes) -> None:
    # Only the caption: a batch changes the rounding, and so the last digits of probabilities.
    def ask(seed: int) -> str:
        return str(post(url, image, method="sample", seed=seed).json()["caption"])

    with ThreadPoolExecutor(5) as pool:
        first, second, again, third, last = pool.map(ask, [1, 2, 1, 3, 1])
    assert first == again == last
    assert len({first, second, third}) > 1


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("beam", "0", "beam=0: input should be greater than or equal to 1; see /docs"),
        ("beam", "99", "beam=99: input should be less than or equal to 20; see /docs"),
        ("length_penalty", "11", "length_penalty=11: input should be less than or equal to 10; see /docs"),
        ("top_p", "0", "top_p=0: input should be greater than 0; see /docs"),
        ("baem", "3", "baem=3: extra inputs are not permitted; see /docs"),
        ("prefix", "zebrafish", "'zebrafish'"),
    ],
)
def test_an_invalid_option_is_refused_by_name(
    url: str, image: bytes, key: str, value: str, error: str
) -> None:
    answer = post(url, image, **{key: value})
    assert answer.status_code == 422
    assert error in answer.json()["error"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(url: str) -> None:
    answer = httpx.post(
        f"{url}/caption", content=iter([bytes(150_000)] * 2), headers=JPEG, timeout=300, verify=False
    )
    assert answer.status_code == 413


def test_a_request_beyond_the_limit_gets_503_and_retry_after(pipeline: Counting) -> None:
    service = Service(pipeline, Limits(max_requests=1))
    app = create_api(service, "tiny")

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.post("/caption", content=b"", headers=JPEG)

    with service.admit():
        with pytest.raises(RequestError, match="1 requests are waiting, expected at most 1"), service.admit():
            pass
        answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    with service.admit():
        pass
    service.close()


def test_an_error_in_a_batch_reaches_all_requests_in_it_and_the_next_are_served(
    pipeline: Counting, synthetic_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, request = (
        pipeline.view(next((synthetic_coco / "test2017").iterdir())),
        pipeline.generation_request(),
    )
    [[expected]] = pipeline.generate([view], request, [0])
    failed = threading.Event()
    real = pipeline.generate

    def generate(*arguments, **keywords):
        if not failed.is_set():
            failed.set()
            raise MemoryError("no memory")
        return real(*arguments, **keywords)

    monkeypatch.setattr(pipeline, "generate", generate)
    # Both are in the first batch, however busy the machine is.
    service = Service(pipeline, Limits(max_batch_size=2, max_queue_delay_s=600.0))
    for answer in [service.submit(view, request) for _ in range(2)]:
        with pytest.raises(MemoryError, match="no memory"):
            answer.result(600)
    both = [service.submit(view, request) for _ in range(2)]
    assert [answer.result(600)[0].words for answer in both] == [expected.words] * 2
    service.close()


def test_the_docs_page_describes_the_endpoint_and_loads_nothing_from_elsewhere(url: str) -> None:
    described, page = (
        httpx.get(f"{url}/openapi.json", verify=False).json(),
        httpx.get(f"{url}/docs", verify=False).text,
    )
    operation = described["paths"]["/caption"]["post"]
    assert {"beam", "top_p", "seed"} <= {option["name"] for option in operation["parameters"]}
    refusal = operation["responses"]["422"]["content"]["application/json"]["schema"]
    assert refusal["$ref"].endswith("ErrorResponse")
    loaded = re.findall(r"(?:src|href|url)[=:] ?[\"\']([^\"\']+)", page)
    assert len(loaded) == 4
    for path in loaded:
        assert httpx.get(f"{url}{path}", verify=False).status_code == 200
    # Of the run's name, which is in the description alone.
    assert "alert" not in page
    assert "alert" in described["info"]["description"]
