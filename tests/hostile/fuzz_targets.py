"""What is fuzzed: kinds of files that captionscale reads, and the commands that read them."""

from dataclasses import dataclass

IMAGE = "scenes/val2017/000000000013.jpg"
_COCO = "scenes/annotations/captions_{0}2017.json --images scenes/{0}2017 --split {0}"
_PACK_COCO = f"pack coco --captions {_COCO} --workers 1 --out"


@dataclass(frozen=True)
class Target:
    """Files of a kind, and what reads them.

    Attributes:
        files: Patterns of their names.
        needs: Files and folders that the commands take.
        commands: One a line, in which `{}` is the mutated file; behind a `>` what it may write besides names
            that begin with `out`.
        weight: How often it is taken, relative to others.
    """

    files: str
    needs: str
    commands: str
    weight: int = 2


_SHARDS = "shards run scenes folder experiment.toml"
_READ_SHARDS = f"""
verify shards --workers 1
verify shards --workers 1 --deep
stats shards
show shards 13
show shards 2 --out out.jpg
caption run --split val --shards shards --out out.json --beam 1 > run
{_PACK_COCO.format("test")} shards > shards
pack folder --images folder --split test --workers 1 --out shards > shards
train experiment.toml --set train.steps=1 --out out > shards
"""
_RUN = "run other shards scenes experiment.toml"
_READ_RUN = f"""
caption run {IMAGE} --beam 1
caption run {IMAGE} --ensemble other
attend run {IMAGE} --out out --beam 1
report run --out out.html
report other --against run --out out.html
watch run --once
export run --format hub --out out
caption run --split val --out out.json > run
score run --split val --beam 1 > run
train experiment.toml --set train.steps=3 --out run > run shards
train experiment.toml --set train.init_from=run --set train.steps=1 --out out > shards
"""

TARGETS = {
    "manifest": Target("shards/manifest.json", _SHARDS, _READ_SHARDS, 3),
    "index": Target("shards/*.index.npy", _SHARDS, _READ_SHARDS, 3),
    "shard": Target(
        "shards/*.tar", _SHARDS, _READ_SHARDS + "pack webdataset --tars shards --workers 1 --out out", 3
    ),
    "tar": Target("tars/*", "tars", "pack webdataset --tars tars --workers 1 --max-rejected 0.5 --out out"),
    "features": Target(
        "shards/features/*", _SHARDS, "train experiment.toml --set train.steps=1 --out out > shards", 1
    ),
    "checkpoint": Target("run/checkpoints/*/*", _RUN, _READ_RUN, 6),
    "state": Target("run/checkpoints/*/state.json", _RUN, _READ_RUN, 3),
    "hub": Target(
        "hub/*",
        "hub run scenes",
        f"load hub {IMAGE}\ncaption hub {IMAGE} --beam 1\ncaption run {IMAGE} --ensemble hub",
        3,
    ),
    "logs": Target(
        "run/*.jsonl run/.lock run/config.toml run/*/*.json* run/scores/*/captions.json", _RUN, _READ_RUN, 4
    ),
    "receipt": Target(
        "run/scores/*/receipt.json",
        _RUN,
        """
board run other --out out.html
compare run other
compare other run --json
report run --out out.html
export run --format hub --out out
""",
        4,
    ),
    "config": Target(
        "experiment.toml",
        "experiment.toml shards",
        """
config experiment.toml
submit experiment.toml --dry-run --out out
launch --dry-run -- train experiment.toml --out out
train experiment.toml --out out > shards
doctor experiment.toml --quick --out out
""",
        5,
    ),
    "profile": Target(
        "profile.yaml",
        "profile.yaml experiment.toml shards",
        """
launch --profile profile.yaml --dry-run -- train experiment.toml --out out
submit experiment.toml --profile profile.yaml --dry-run --out out
""",
    ),
    "results": Target(
        "results.json references.json",
        "results.json references.json",
        """
score --captions results.json --references references.json --out out.json
leaderboard --eval-set nocaps-val --captions results.json --image-info references.json --name x --out out
""",
        4,
    ),
    "coco": Target("scenes/annotations/captions_val2017.json", "scenes", f"{_PACK_COCO.format('val')} out"),
    "karpathy": Target(
        "karpathy.json",
        "scenes karpathy.json",
        "pack karpathy --images scenes/val2017 --captions karpathy.json --workers 1 --out out",
    ),
    "flickr": Target(
        "flickr/*",
        "scenes flickr",
        "pack flickr8k --images scenes/val2017 --captions flickr/captions.txt --splits flickr --workers 1"
        " --out out",
    ),
    "table": Target(
        "tables/*", "scenes tables", "pack table --images scenes/val2017 --captions {} --workers 1 --out out"
    ),
    "folder": Target(
        "folder/*", "folder", "pack folder --images folder --workers 1 --max-rejected 0.5 --out out"
    ),
    "packing": Target(
        "half/.packing/* half/.lock half/rejected.jsonl",
        "half photos",
        """
pack folder --images photos --images-per-shard 2 --workers 1 --max-rejected 0.5 --out half > half
verify half --workers 1
""",
    ),
    "rejected": Target(
        "rejects/rejected.jsonl",
        "rejects scenes",
        f"verify rejects --workers 1\n{_PACK_COCO.format('test')} rejects > rejects",
    ),
    "image": Target(
        "photos/image.*",
        "photos run",
        """
caption run {}
attend run {} --beam 1 --out out
pack folder --images photos --workers 1 --max-rejected 0.5 --out out
""",
        6,
    ),
    "weights": Target(
        "weights/*",
        "weights experiment.toml shards",
        "train experiment.toml --set model.encoder.weights={} --set train.steps=1"
        " --set train.cache_features=false --out out",
    ),
}
