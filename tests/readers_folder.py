"""The folder in which a reader of the documentation types its commands, and the programs that answer there.

Drawn scenes stand for COCO, Flickr8k and nocaps, and tiny experiments for the configs.
"""

import csv
import json
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import torch
from experiment import TINY_OVERRIDES

from captionscale import toml
from captionscale.cli import main
from captionscale.model.encoders.torchvision import TorchvisionEncoder as Encoder

ROOT = Path(__file__).parents[1]
DOCS_IMAGE_ID = 391895
"""The image that the documentation shows, as one of train is called here."""
DOCS_OVERRIDES = (
    *TINY_OVERRIDES,
    "data.image_size=64",
    "data.color_jitter=0.0",
    "model.encoder.trainable=none",
    "train.epochs=1",
    # One step of as many micro-batches as the processes that the documentation speaks of.
    "train.global_batch=48",
    "train.micro_batch=3",
    "scst.max_dangling_increase=1.0",
    "scst.min_distinct_ratio=0.0",
)
MOBILENET = "model.encoder.name=mobilenet_v2"
EXPERIMENTS = {
    "attention": DOCS_OVERRIDES,
    "attention_scst": DOCS_OVERRIDES,
    # The documentation gives it a file of weights.
    "flickr8k": (*DOCS_OVERRIDES, MOBILENET),
    # The plain decoder has no attention.
    "show_and_tell": [it for it in DOCS_OVERRIDES if "attention_size" not in it],
}
"""Names of configs, and what each is changed by."""
QUICKSTARTS = ("val2017/000000002001.jpg", "test2017/000000002156.jpg")
"""Of its drawings, those that the documentation names."""
PROGRAMS = {
    "python": '#!/bin/sh\nexec {python} "$@"\n',
    "captionscale": '#!/bin/sh\nexec {python} -m captionscale "$@"\n',
    # It checks its own options and the script; the other arguments must be valid for the script's command.
    "sbatch": """#!{python}
import argparse, pathlib, subprocess, sys
from captionscale.commands.parser import parser
sbatch = argparse.ArgumentParser("sbatch", allow_abbrev=False)
for option in ("--nodes", "--gpus-per-node", "--time", "--dependency", "--cpus-per-task"):
    sbatch.add_argument(option)
sbatch.add_argument("--parsable", action="store_true")
sbatch.add_argument("script", type=pathlib.Path)
sbatch.add_argument("arguments", nargs=argparse.REMAINDER)
options = sbatch.parse_args()
subprocess.run(["bash", "-n", options.script], check=True)
match options.script.stem.split("_")[-1]:
    case "pack" | "score" as command:
        parser().parse_args([command, *options.arguments])
    case "node":
        experiment, run, *changes = options.arguments
        parser().parse_args(["train", experiment, "--out", run, *changes])
    case "job":
        assert not options.arguments
    case other:
        sys.exit(f"no script of ours: {{other}}")
print("17" if options.parsable else "Submitted batch job 17")
""",
}


def make_folder(folder: Path, synthetic_coco: Path) -> None:
    """Make the folder: originals and other files under the names that the documentation has for them."""
    _programs(folder / "bin")
    for name in ("configs", "launch", "shards", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    for name, overrides in EXPERIMENTS.items():
        (folder / name).write_text(toml.dumps(toml.load(name, overrides)), encoding="utf-8")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    documents = _coco(folder, synthetic_coco)
    _flickr8k(folder, documents)
    _own(folder, documents)
    _others(folder, synthetic_coco, documents)


def run_setup_commands() -> None:
    """Do, within the folder, what most pages take for done."""
    for split in ("train", "val", "test"):
        captions = f"coco/annotations/captions_{split}2017.json"
        _say(f"pack coco --images coco/{split}2017 --captions {captions} --split {split} --out data/coco")
    listed = "coco/annotations/image_info_test2017.json"
    _say(f"pack coco --images coco/test2017 --captions {listed} --split test --out data/coco2017")
    _say("train attention --out runs/attention")
    _say("train show_and_tell --out runs/show_and_tell")
    for other in ("attention2", "attention3"):
        shutil.copytree("runs/attention", f"runs/{other}")
    Path("quickstart/run").symlink_to("../runs/attention")
    _say("caption runs/attention --split test --out results.json")
    _say("score runs/attention2 --split val --beam 1 --out other/receipt.json")


def _say(command: str) -> None:
    main(command.split())


def _programs(folder: Path) -> None:
    folder.mkdir()
    for name, text in PROGRAMS.items():
        path = folder / name
        path.write_text(text.format(python=sys.executable), encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _coco(folder: Path, synthetic_coco: Path) -> dict[str, dict[str, Any]]:
    """Write COCO of both years, official and Karpathy's; return its captions files."""
    annotations = folder / "coco" / "annotations"
    annotations.mkdir(parents=True)
    documents = {}
    for split in ("train", "val", "test"):
        document = json.loads((synthetic_coco / "annotations" / f"captions_{split}2017.json").read_text())
        if split == "train":
            first = document["images"][0]["id"]
            for each, key in ((document["images"], "id"), (document["annotations"], "image_id")):
                for line in each:
                    line[key] = DOCS_IMAGE_ID if line[key] == first else line[key]
            # Words that the documentation asks captions for.
            document["annotations"][0]["caption"] = "a photo of a dog"
        documents[split] = document
        for year in (2014, 2017):
            (folder / "coco" / f"{split}{year}").symlink_to(synthetic_coco / f"{split}2017")
            (annotations / f"captions_{split}{year}.json").write_text(json.dumps(document))
            listed = {"images": document["images"]}
            (annotations / f"image_info_{split}{year}.json").write_text(json.dumps(listed))
    images = [
        {
            "split": split,
            "filepath": f"{split}2014",
            "filename": image["file_name"],
            "cocoid": image["id"],
            "sentences": [{"raw": text} for text in _captions(document)[image["id"]]],
        }
        for split, document in documents.items()
        for image in document["images"]
    ]
    (folder / "coco" / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    # The recipes' folder of originals may hold those of all data sets.
    (folder / "RAW").symlink_to("coco")
    return documents


def _captions(document: dict[str, Any]) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {image["id"]: [] for image in document["images"]}
    for line in document["annotations"]:
        captions[line["image_id"]].append(line["caption"])
    return captions


def _flickr8k(folder: Path, documents: dict[str, dict[str, Any]]) -> None:
    """Write Flickr8k's files, as its authors and as others give them."""
    raw = folder / "coco"
    (raw / "Flicker8k_Dataset").mkdir()
    (folder / "Images").symlink_to("coco/Flicker8k_Dataset")
    tokens, rows = [], ["image,caption"]
    for split, document in documents.items():
        names = {image["id"]: image["file_name"] for image in document["images"]}
        for number, captions in _captions(document).items():
            shutil.copy(raw / f"{split}2017" / names[number], raw / "Flicker8k_Dataset")
            tokens += [f"{names[number]}#{k}\t{text}" for k, text in enumerate(captions)]
            rows += [f"{names[number]},{text}" for text in captions]
        listed = raw / f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
        listed.write_text("\n".join(names.values()))
        shutil.copy(listed, folder)
    (raw / "Flickr8k.token.txt").write_text("\n".join(tokens))
    (folder / "captions.txt").write_text("\n".join(rows))


def _own(folder: Path, documents: dict[str, dict[str, Any]]) -> None:
    """Write a user's own table."""
    (folder / "photos").symlink_to("coco/Flicker8k_Dataset")
    with (folder / "mine.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for split in ("train", "val"):
            names = {image["id"]: image["file_name"] for image in documents[split]["images"]}
            for number, captions in _captions(documents[split]).items():
                table.writerows([names[number], text, split] for text in captions)


def _others(folder: Path, synthetic_coco: Path, documents: dict[str, dict[str, Any]]) -> None:
    """Write the other files that commands name: images, lists of images, references, weights."""
    photos = sorted((synthetic_coco / "test2017").iterdir())
    shutil.copy(photos[0], folder / "photo.jpg")
    shutil.copy(photos[1], folder / "another.jpg")
    (folder / "album").mkdir()
    for photo in photos[:2]:
        shutil.copy(photo, folder / "album")
    entries = "".join(
        f'<photo file="{photo.name}"><text>a drawn scene</text></photo>' for photo in photos[:2]
    )
    (folder / "album" / "album.xml").write_text(f"<album>{entries}</album>")
    for place in QUICKSTARTS:
        drawing = folder / "quickstart" / "coco" / place
        drawing.parent.mkdir(parents=True)
        shutil.copy(photos[2], drawing)
    (folder / "nocaps").mkdir()
    for part, split in (("val", "test"), ("test", "val")):
        (folder / "nocaps" / part).symlink_to(synthetic_coco / f"{split}2017")
        listed = {"images": documents[split]["images"]}
        (folder / f"nocaps_{part}_image_info.json").write_text(json.dumps(listed))
    (folder / "captions_val2014.json").write_text(json.dumps(documents["test"]))
    torch.manual_seed(0)
    encoder = Encoder(toml.load("flickr8k", EXPERIMENTS["flickr8k"]).model.encoder)
    torch.save(encoder.backbone.state_dict(), folder / "WEIGHTS")
