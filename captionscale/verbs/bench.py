"""The verb that measures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from captionscale.verbs.values import Verbs, add_config, positive, settings

if TYPE_CHECKING:
    from captionscale.tools.bench.race import Heat, Sheet


def add(verbs: Verbs) -> None:
    """Add it to the command line."""
    bench = verbs.add_parser("bench", help="measure ours beside the ways that people have today")
    what = bench.add_subparsers(required=True, metavar="WHAT", dest="what")
    packing = what.add_parser("pack", help="from image files to shards")
    packing.add_argument("--images", type=Path, help="folder of JPEGs (default: drawn ones)")
    packing.add_argument(
        "--folder", type=Path, help="where to write (default: the system's temporary folder)"
    )
    packing.add_argument(
        "--count", type=positive, default=1000, metavar="N", help="images in a run (default: 1000)"
    )
    packing.set_defaults(measure=_pack)
    saving = what.add_parser("save", help="what a checkpoint costs the training loop")
    add_config(saving, required=False)
    saving.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    saving.set_defaults(measure=_save, config="attention")
    step = what.add_parser("step", help="what the machinery costs a training step, and how fast a run starts")
    add_config(step, required=False)
    step.set_defaults(measure=_step)
    order = what.add_parser("order", help="what each rank reads, on 1 to 1,024 ranks")
    order.add_argument("--shards", help="folder, or URL, to measure beside the simulation")
    order.add_argument("--split", default="train", help="of these shards (default: %(default)s)")
    order.set_defaults(measure=_order)
    scoring = what.add_parser("score", help="the evaluator beside pycocoevalcap's own classes")
    scoring.add_argument("--captions", type=Path, metavar="RESULTS", help="results (default: drawn scenes')")
    scoring.add_argument("--references", type=Path, metavar="CAPTIONS", help="COCO captions of these images")
    scoring.set_defaults(measure=_score)
    reward = what.add_parser("reward", help="CIDEr-D as the reward of training, beside dictionaries")
    reward.add_argument("--references", type=Path, help="COCO captions JSON (default: invented captions)")
    reward.set_defaults(measure=_reward)
    scst = what.add_parser("scst", help="the parts of a step of self-critical training")
    scst.add_argument("run", type=Path, metavar="RUN", help="whose weights and train images it takes")
    scst.add_argument(
        "--images", type=positive, default=64, metavar="N", help="in a step (default: %(default)s)"
    )
    scst.set_defaults(measure=_scst)
    for parts in what.choices.values():
        parts.add_argument("--rounds", type=positive, default=5, metavar="N", help="of each way (default: 5)")
        parts.add_argument("--json", action="store_true", help="for machines")
        parts.set_defaults(verb="bench", handler=_bench)


def _bench(options: argparse.Namespace) -> None:
    from captionscale.tools.bench import race

    race.show(options.measure(options), as_json=options.json)


def _pack(options: argparse.Namespace) -> "list[Heat]":
    from captionscale.tools.bench import pack

    return pack.bench(options.images, options.folder, count=options.count, rounds=options.rounds)


def _save(options: argparse.Namespace) -> "list[Heat]":
    from captionscale.tools.bench import save

    return save.bench(settings(options), options.folder, rounds=options.rounds)


def _step(options: argparse.Namespace) -> "list[Sheet]":
    from captionscale.tools.bench import step

    return step.bench(settings(options) if options.config else None, rounds=options.rounds)


def _score(options: argparse.Namespace) -> "list[Heat | Sheet]":
    from captionscale.tools.bench import score

    return score.bench(options.captions, options.references, rounds=options.rounds)


def _reward(options: argparse.Namespace) -> "list[Heat]":
    from captionscale.tools.bench import reward

    return reward.bench(options.references, rounds=options.rounds)


def _scst(options: argparse.Namespace) -> "list[Sheet]":
    from captionscale.tools.bench import scst

    return scst.bench(options.run, images=options.images, rounds=options.rounds)


def _order(options: argparse.Namespace) -> "list[Sheet]":
    from captionscale.tools.bench import order

    return order.bench(options.shards, options.split)
