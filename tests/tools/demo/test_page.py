"""The page in a real browser, served by the real command."""

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from experiment import peaked_run

CHROMIUM = Path("/usr/bin/chromium")
WAIT_MS = 180_000


def start(run: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start the demo with a temporary folder of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "captionscale", "demo", str(run), "--port", "0", *options],
        env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def url(packed: Path, tmp_path_factory: pytest.TempPathFactory, temporary: Path) -> Iterator[str]:
    with start(peaked_run(tmp_path_factory.mktemp("page"), packed), temporary) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    # Nothing is left of what was sent, nor of what the page wrote.
    assert [path for path in temporary.iterdir() if path.name.startswith("captionscale")] == []


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")
def test_an_image_is_dropped_and_a_clicked_word_shows_its_attention(
    url: str, synthetic_coco: Path, temporary: Path
) -> None:
    from playwright.sync_api import Request, sync_playwright

    image, text = sorted((synthetic_coco / "test2017").iterdir())[0], Path(__file__)
    foreign: list[str] = []

    def note(request: Request) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            foreign.append(request.url)

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", note)
        page.goto(f"{url}/docs")
        page.wait_for_selector(".opblock-summary")
        page.goto(url)
        page.wait_for_selector("#samples img")
        # A sample comes with its references.
        page.locator("#samples button:has(img)").first.click()
        page.wait_for_selector("#image li")
        page.locator("#drop input[type=file]").set_input_files(image)
        page.wait_for_selector("#image:not(:has(li)) img")
        plain = page.locator("#image img").get_attribute("src") or ""
        words = page.locator("#words [role=button]")
        assert page.locator("#captions input[type=radio]").count() > 1
        best = page.locator("#words").inner_text()
        page.locator("#captions label").nth(1).click()
        page.wait_for_function("old => document.querySelector('#words').innerText != old", arg=best)
        page.locator("#captions label").nth(0).click()
        page.wait_for_function("old => document.querySelector('#words').innerText == old", arg=best)
        first, second = words.nth(0).inner_text().split()[0], words.nth(1).inner_text().split()[0]
        words.nth(1).click()
        page.wait_for_function("old => document.querySelector('#image img').src != old", arg=plain)
        assert page.locator("#image b").inner_text() == second
        shown = page.locator("#image img").get_attribute("src") or ""
        assert base64.b64decode(shown.partition(",")[2])[:2] == b"\xff\xd8"
        words.nth(0).click()
        page.wait_for_function("old => document.querySelector('#image img').src != old", arg=shown)
        assert page.locator("#image b").inner_text() == first
        # No upload is on disk, only the samples' thumbnails.
        kept = [path for path in temporary.rglob("*") if path.is_file() and path.stat().st_size]
        assert {path.suffix for path in kept} <= {".webp"}
        page.get_by_role("tab", name="Many images").click()
        page.locator("#files input[type=file]").set_input_files([image, text])
        with page.expect_download() as download:
            page.locator("#download a").click()
        table = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
        assert table[0] == "file,caption,log p,problem"
        assert table[1].startswith(f"{image.name},{first} {second}")
        assert "not a readable image" in table[2]
        browser.close()
    assert foreign == []


def test_a_port_in_use_or_a_folder_without_a_run_is_an_error_of_one_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from captionscale.cli import main

    port = url.rpartition(":")[2]
    for options, error in (
        (["--port", port], f"--port {port}: in use by another program"),
        (["--port", "99999"], "--port 99999: cannot listen there"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 7860: cannot listen there"),
        (["--port", "0"], "no checkpoint, so no run"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["demo", str(tmp_path), *options])
        assert caught.value.code == 1
        assert error in capsys.readouterr().err
