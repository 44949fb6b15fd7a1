"""Passwords and tokens in URLs are used, and reach nothing that is printed, logged or saved."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from experiment import TINY_OVERRIDES

from captionscale import cli, credentials, toml
from captionscale.config import Config, Data
from captionscale.errors import UserError

PASSWORD, TOKEN = "hunter2-of-the-test", "tok-5f3a9c"
LOGIN = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()

IN_TURN = """
import json, os, sys
import numpy as np
from captionscale import cli
from captionscale.score.meteor import Meteor

# Its Java takes seconds, and is given captions alone.
Meteor.statistics = lambda _, captions, references: np.zeros((len(captions), Meteor.width))
codes = []
for command in json.loads(sys.argv[1]):
    os.environ.pop("CAPTIONSCALE_URLS", None)
    sys.argv = ["captionscale", *command]
    try:
        cli.main()
        codes.append(0)
    except SystemExit as ended:
        codes.append(ended.code)
    print("next command", file=sys.stderr, flush=True)
print(*codes)
"""


class Handler(SimpleHTTPRequestHandler):
    """Gives files to who has the password and the token."""

    refused = 0

    def do_GET(self) -> None:
        if self.headers["Authorization"] != LOGIN or f"token={TOKEN}" not in self.path:
            type(self).refused += 1
            self.send_error(401)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("CAPTIONSCALE_URLS", "{}")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(packed))) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://me:{PASSWORD}@127.0.0.1:{server.server_port}?token={TOKEN}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("url", "stripped"),
    [
        ("https://me:secret@host/coco", "https://host/coco"),
        ("https://secret@host:8000/coco/", "https://host:8000/coco/"),
        ("s3://KEY:secret@bucket/coco", "s3://bucket/coco"),
        ("https://me:se/secret@host/coco", "https://host/coco"),
        ("https://me:p@secret@host/coco", "https://host/coco"),
        ("simplecache::https://me:secret@host/coco", "simplecache::https://host/coco"),
        ("https://host/coco?token=secret", "https://host/coco"),
        ("https://host/coco?sv=2024&sig=secret&se=1", "https://host/coco?sv=2024&se=1"),
        ("https://host/c?X-Amz-Signature=secret&X-Amz-Date=1", "https://host/c?X-Amz-Date=1"),
        ("https://host/c?X-Amz-Credential=secret", "https://host/c"),
        ("https://host/c?x=secretsecretsecret", "https://host/c"),
        ("https://host/c?a=1&&password=secret", "https://host/c?a=1"),
        ("HTTPS://me:secret@HOST/c", "HTTPS://HOST/c"),
        # These have none.
        ("https://host/@scope/coco?dl=1", "https://host/@scope/coco?dl=1"),
        ("https://[::1]:80/a@b", "https://[::1]:80/a@b"),
        ("me@host: text?token=1", "me@host: text?token=1"),
        ("/folder/with:colon@sign", "/folder/with:colon@sign"),
        (f"https://host/c?revision={'2c1d7f3a' * 5}", f"https://host/c?revision={'2c1d7f3a' * 5}"),
        ("https://host/c?versionId=3HL4kqtJlcpXroDTDmJ", "https://host/c?versionId=3HL4kqtJlcpXroDTDmJ"),
        ("abfss://container@account.host/coco", "abfss://container@account.host/coco"),
        ("az://me:secret@account/coco", "az://account/coco"),
    ],
)
def test_a_url_is_stripped_of_what_may_be_a_key(
    url: str, stripped: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPTIONSCALE_URLS", "{}")
    assert credentials.strip(url) == stripped
    assert credentials.strip(f'--set a.b="{url}" next') == f'--set a.b="{stripped}" next'
    for _ in range(2):
        assert credentials.strip_and_remember(url) == stripped
    assert credentials.restore(stripped) == credentials.restore(f"{stripped.rstrip('/')}") == url
    said = capsys.readouterr().err
    assert said.count("warning: ") == (url != stripped)
    assert "secret" not in said


def test_every_string_of_an_experiment_is_stripped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONSCALE_URLS", "{}")
    path = tmp_path / "experiment.toml"
    secret = "https://me:hunter@host/x"
    path.write_text(
        f'[data]\nshards = "{secret}"\ncache = "{secret}"\n[model.encoder]\nweights = "{secret}"\n'
        f'[train]\ninit_from = "{secret}"\n'
    )
    settings = toml.load(path, [f"data.val_split={secret}"])
    assert settings.data.shards == "https://host/x"
    assert "hunter" not in toml.dumps(settings) + repr(settings)
    assert "hunter" not in repr(Config(data=Data(shards=secret)))
    with pytest.raises(UserError) as error:
        toml.load(path, [f"train.epochs={secret}"])
    assert "hunter" not in str(error.value)
    assert "https://host/x" in str(error.value)


def test_no_byte_that_a_run_leaves_has_the_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTIONSCALE_CACHE", str(tmp_path / "cache"))
    experiment = tmp_path / "run.toml"
    experiment.write_text(f'[data]\nshards = "{url}"\n')
    run, export = str(tmp_path / "run"), str(tmp_path / "export")
    changes = [f"--set={change}" for change in (*TINY_OVERRIDES, "train.steps=2", "search.beam=1")]
    commands = [
        ["train", str(experiment), "--out", run, *changes],
        # Without the credentials it is told that they are not saved; it takes them from an option.
        ["score", run, "--split", "test"],
        ["score", run, "--split", "test", "--shards", url, "--out", str(tmp_path / "test.json")],
        ["report", run],
        ["export", run, "--format", "hub", "--out", export, "--shards", url],
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    codes, said = done.stdout.splitlines()[-1], done.stdout + done.stderr
    assert codes == "0 1 0 0 0", said
    assert PASSWORD not in said
    assert TOKEN not in said
    trained, told = done.stderr.split("next command")[:2]
    assert trained.count("is used now but saved nowhere") == 1
    assert "401" in told
    assert "those in a URL are not saved with a run" in told
    assert f'shards = "{credentials.strip(url)}"' in (tmp_path / "run" / "config.toml").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != experiment]
    assert {"config.toml", "test.json", "README.md"} <= {path.name for path in files}
    for path in files:
        assert PASSWORD.encode() not in path.read_bytes(), path
        assert TOKEN.encode() not in path.read_bytes(), path


def test_launched_ranks_have_what_their_command_does_not_say(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["captionscale", "launch", "--dry-run", "--", "stats", url])
    cli.main()
    out = capsys.readouterr().out
    assert credentials.strip(url) in out
    assert PASSWORD not in out + " ".join(sys.argv)
    code = f"from captionscale import credentials; print(credentials.restore({credentials.strip(url)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == url


def test_submit_refuses_a_url_with_a_password(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "quickstart", "--out", str(run), "--set", f"data.shards={url}"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert (
        f"data.shards = {credentials.strip(url)}: was given with a password, key or token, which is" in said
    )
    assert PASSWORD not in said
    assert not run.exists()
