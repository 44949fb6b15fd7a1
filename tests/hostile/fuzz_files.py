"""Small files of every kind that captionscale reads, made by captionscale itself, and their checksums."""

import hashlib
import io
import json
import os
import shlex
import shutil
import tarfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from blake3 import blake3
from fuzz_targets import IMAGE
from PIL import Image

from captionscale import cli

_CHANGES = (
    "data.image_size=32",
    "data.min_count=1",
    "data.max_words=8",
    "data.workers=1",
    "data.flip=false",
    "data.color_jitter=0",
    "data.crop_scale=[1,1]",
    "model.encoder.name=mobilenet_v2",
    "model.encoder.weights=none",
    "model.decoder.embed_size=16",
    "model.decoder.hidden_size=16",
    "model.decoder.attention_size=16",
    "train.steps=2",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.precision=fp32",
    "train.log_every=1",
    "train.cache_features=true",
)
_FIGURES = {
    "epoch": 0.5,
    "loss": 4.9,
    "lr": 5e-4,
    "grad_norm": 0.6,
    "images_per_s": 9.0,
    "captions_per_s": 9.0,
}
_STALLED = {
    "rank": 0,
    "host": "h",
    "pid": 1,
    "step": 3,
    "stalled_s": 9.0,
    "busy": "",
    "waiting": False,
    "validating": False,
    "stack": ["a"],
    "heartbeats": 3,
    "silent": False,
    "shards": ["x"],
}


def build(root: Path) -> None:
    """Write files of every kind into a folder, which becomes the working directory."""
    from captionscale import toml
    from captionscale.data.synthetic import write_coco

    os.chdir(root)
    write_coco(Path("scenes"), counts={"train": 12, "val": 4, "test": 2}, size=48)
    for split in ("train", "val"):
        _run(
            f"pack coco --images scenes/{split}2017 --captions scenes/annotations/captions_{split}2017.json"
            f" --split {split} --out shards --images-per-shard 6 --workers 1"
        )
    settings = Path("experiment.toml")
    settings.write_text('[data]\nshards = "shards"\n')
    settings.write_text(toml.dumps(toml.load(settings, [*_CHANGES])))
    _run("train experiment.toml --out run --sample-log")
    _run("score run --split val --beam 1")
    _run("export run --format hub --out hub")
    # The first drawing of a process takes seconds.
    _run("report run --out report.html")
    _run(f"attend run {IMAGE} --out attend --beam 1")
    # Times and paces would make cases differ from one call to the next.
    scores = {"BLEU-4": 0.1, "ROUGE-L": 0.2, "CIDEr-D": 0.3}
    log = [
        {"step": 1} | _FIGURES,
        {"step": 2} | _FIGURES,
        {"step": 2, "scores": scores},
        {"step": 2, "save_s": 0.1},
    ]
    _lines("run/log.jsonl", log)
    _lines("run/stalls.jsonl", [{"time": 1.0, "stalled_s": 60.0, "stalled": [_STALLED], "waiting": [1]}])
    Path("run/.lock").write_text("captionscale train, process 1 on host")
    copy("run", "other")
    Path("profile.yaml").write_text(
        "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: 2\n"
    )
    shutil.copy("run/validation/step-00000002.json", "results.json")
    shutil.copy("scenes/annotations/captions_val2017.json", "references.json")
    _captions()
    _images()
    # Too many damaged images end it where a kill would: what is finished is kept.
    with suppress(SystemExit):
        _run("pack folder --images photos --images-per-shard 2 --workers 1 --out half")
    copy("shards", "rejects")
    facts = json.loads(Path("rejects/manifest.json").read_bytes())
    facts["splits"]["train"]["rejected"] = 1
    Path("rejects/manifest.json").write_text(json.dumps(facts))
    rejected = {"split": "train", "image_id": 7, "file": "a.jpg", "offset": 0, "reason": "bad"}
    _lines("rejects/rejected.jsonl", [rejected])
    _weights()


def _run(command: str) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cli.main(shlex.split(command))


def _lines(path: str, lines: list[Any]) -> None:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _captions() -> None:
    """Write the references in every other layout."""
    document = json.loads(Path("references.json").read_bytes())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    pairs = [(names[row["image_id"]], row["caption"]) for row in document["annotations"]]
    for folder in ("tables", "flickr", "tars"):
        Path(folder).mkdir()
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        rows = [delimiter.join(pair) for pair in (("image", "caption"), *pairs)]
        Path(f"tables/table.{ending}").write_text("\n".join(rows) + "\n")
    _lines("tables/table.jsonl", [{"image": name, "caption": text, "split": "val"} for name, text in pairs])
    Path("flickr/captions.txt").write_text(
        "image,caption\n" + "".join(f"{name},{text}\n" for name, text in pairs)
    )
    Path("flickr/Flickr_8k.trainImages.txt").write_text("".join(f"{name}\n" for name in names.values()))
    images = [
        {
            "filename": name,
            "split": "val",
            "sentences": [{"raw": text} for each, text in pairs if each == name],
        }
        for name in names.values()
    ]
    Path("karpathy.json").write_text(json.dumps({"dataset": "flickr8k", "images": images}))
    with tarfile.open("tars/00000.tar", "w") as tar:
        for name, text in dict(pairs).items():
            tar.add(f"scenes/val2017/{name}", name)
            for ending, data in (("txt", text.encode()), ("json", json.dumps({"caption": text}).encode())):
                member = tarfile.TarInfo(f"{Path(name).stem}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _images() -> None:
    """Write a folder of images with captions, and an image in every format."""
    for folder in ("folder", "photos"):
        Path(folder).mkdir()
    image, other = (Image.open(path) for path in sorted(Path("scenes/test2017").iterdir()))
    for number, each in enumerate((image, other)):
        each.save(f"folder/{number}.png")
        Path(f"folder/{number}.txt").write_text("a dog runs\na red café\n")
    frames: dict[str, Any] = {"save_all": True, "append_images": [other, image]}
    image.save("photos/image.jpg", progressive=True)
    image.convert("CMYK").save("photos/image.cmyk.jpg", progressive=True)
    image.convert("I;16").save("photos/image.16.png")
    image.save("photos/image.mpo.jpg", "MPO", **frames)
    image.save("photos/image.gif", **frames)
    for ending in ("png", "webp", "bmp"):
        image.save(f"photos/image.{ending}")
    Path("photos/damaged.jpg").write_bytes(b"\xff\xd8")


def _weights() -> None:
    import torch
    from torchvision.models import mobilenet_v2

    Path("weights").mkdir()
    torch.save(mobilenet_v2(weights=None).state_dict(), "weights/weights.pth")
    shutil.copy("hub/model.safetensors", "weights/weights.safetensors")


def copy(source: Path | str, target: Path | str) -> None:
    """Copy a file or folder; large files are linked, as nothing writes into them."""
    if Path(source).is_dir():
        shutil.copytree(source, target, symlinks=True, copy_function=copy)
    elif str(source).endswith((".safetensors", ".pth")):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def seal(path: Path) -> bool:
    """Make the checksums fit that a file, or another one, holds of it; return whether there are any."""
    folder = path.parent
    if path.name == "receipt.json":
        receipt = json.loads(path.read_bytes())
        facts = {key: value for key, value in receipt.items() if key not in ("environment", "sha256")}
        receipt["sha256"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(receipt))
    elif (folder / "state.json").is_file() and path.name != "state.json":
        state = json.loads((folder / "state.json").read_bytes())
        state["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "state.json").write_text(json.dumps(state))
    elif (folder / "manifest.json").is_file() and path.suffix in (".tar", ".npy"):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        name = path.name.split("-")[0].split(".")[0]
        facts, index = manifest["splits"][name], folder / f"{name}.index.npy"
        if path.suffix == ".tar":
            _seal_shard(path, index, facts["shards"][int(path.stem[-5:])])
        facts["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
        # NumPy's readers let out errors of all kinds.
        with suppress(Exception):
            facts["images"] = len(np.load(index))
        (folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        return False
    return True


def _seal_shard(path: Path, index: Path, facts: dict[str, Any]) -> None:
    """Write a shard's hash into its manifest's facts, and those of its samples into the index."""
    data, rows = path.read_bytes(), np.load(index)
    facts |= {"size_bytes": len(data), "blake3": blake3(data).hexdigest()}
    for number in np.flatnonzero(rows["shard"] == int(path.stem[-5:])):
        for part in ("image", "json"):
            start, size = (int(rows[f"{part}_{fact}"][number]) for fact in ("offset", "size"))
            rows[f"{part}_hash"][number] = xxhash.xxh3_64_intdigest(data[start : start + size])
    np.save(index, rows)
