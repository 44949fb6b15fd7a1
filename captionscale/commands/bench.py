"""The command that measures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from captionscale.commands.arguments import Subparsers, add_config, load_config, positive
from captionscale.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from captionscale.tools.bench.race import Heat, Sheet


def add(subparsers: Subparsers) -> None:
    """Add it to the command line."""
    bench = subparsers.add_parser("bench", help="measure ours beside the ways that people have today")
    bench.add_argument("--quick", action="store_true", help="WHAT, or all of them, small: some minutes")
    then = bench.add_mutually_exclusive_group()
    then.add_argument("--check", action="store_true", help="with --quick: has a ratio fallen below half?")
    then.add_argument("--write", action="store_true", help="with --quick: commit these ratios")
    bench.add_argument("--json", action="store_true", help="for machines")
    what = bench.add_subparsers(metavar="WHAT", dest="what")
    packing = what.add_parser("pack", help="from image files to shards")
    packing.add_argument("--images", type=Path, help="folder of JPEGs (default: drawn ones)")
    packing.add_argument(
        "--folder", type=Path, help="where to write (default: the system's temporary folder)"
    )
    packing.add_argument(
        "--count", type=positive, default=1000, metavar="N", help="images in a run (default: 1000)"
    )
    packing.set_defaults(measure=_pack, small=["--count", "100", "--rounds", "2"])
    loading = what.add_parser("data", help="from shards to batches")
    loading.add_argument("--images", type=Path, help="folder of JPEGs (default: drawn ones)")
    loading.add_argument(
        "--folder", type=Path, help="where to write (default: the system's temporary folder)"
    )
    loading.add_argument(
        "--count", type=positive, default=1000, metavar="N", help="images in a run (default: %(default)s)"
    )
    loading.set_defaults(measure=_data, small=["--count", "200", "--rounds", "2"])
    start = what.add_parser(
        "start", help="imports of each command, first batches, memory, threads that fight"
    )
    start.set_defaults(measure=_start, small=["--rounds", "1"])
    saving = what.add_parser("save", help="what a checkpoint costs the training loop")
    add_config(saving, required=False)
    saving.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    saving.set_defaults(measure=_save, config="attention", small=["--rounds", "3"])
    step = what.add_parser("step", help="what the machinery costs a training step, and how fast a run starts")
    add_config(step, required=False)
    step.add_argument(
        "--images",
        type=positive,
        default=32,
        metavar="N",
        help="beside the tutorial's (default: %(default)s)",
    )
    step.set_defaults(measure=_step, small=["--images", "4", "--rounds", "1"])
    order = what.add_parser("order", help="what each rank reads, on 1 to 1,024 ranks")
    order.add_argument("--shards", help="folder, or URL, to measure beside the simulation")
    order.add_argument("--split", default="train", help="of these shards (default: %(default)s)")
    order.set_defaults(measure=_order)
    scoring = what.add_parser("score", help="the evaluator beside pycocoevalcap's own classes")
    scoring.add_argument("--captions", type=Path, metavar="RESULTS", help="results (default: drawn scenes')")
    scoring.add_argument("--references", type=Path, metavar="CAPTIONS", help="COCO captions of these images")
    scoring.add_argument(
        "--count", type=positive, default=5000, metavar="N", help="images drawn (default: %(default)s)"
    )
    scoring.set_defaults(measure=_score, small=["--count", "500", "--rounds", "1"])
    reward = what.add_parser("reward", help="CIDEr-D as the reward of training, beside dictionaries")
    reward.add_argument("--references", type=Path, help="COCO captions JSON (default: invented captions)")
    reward.set_defaults(measure=_reward, small=["--rounds", "2"])
    decoding = what.add_parser("decode", help="beam search over all images at once, beside one by one")
    decoding.add_argument("--run", type=Path, help="whose decoder it is (default: a random one)")
    decoding.add_argument(
        "--images", type=positive, default=32, metavar="N", help="at once (default: %(default)s)"
    )
    decoding.set_defaults(measure=_decode, small=["--images", "8", "--rounds", "1"])
    scst = what.add_parser("scst", help="the parts of a step of self-critical training")
    scst.add_argument("run", type=Path, metavar="RUN", help="whose weights and train images it takes")
    scst.add_argument(
        "--images", type=positive, default=64, metavar="N", help="in a step (default: %(default)s)"
    )
    scst.set_defaults(measure=_scst)
    scale = what.add_parser("scale", help="two processes beside one, and what 1 to 128 nodes would do")
    add_config(scale, required=False)
    scale.add_argument(
        "--step-ms", type=float, metavar="MS", help="of a micro-batch on one GPU; nothing is measured here"
    )
    scale.add_argument("--gpu-name", metavar="NAME", help="of the GPU that took them")
    scale.set_defaults(measure=_scale, small=["--rounds", "2"])
    for parts in what.choices.values():
        parts.add_argument("--rounds", type=positive, default=5, metavar="N", help="of each way (default: 5)")
        # Else it would undo one that comes before WHAT.
        parts.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="for machines")
    small = {name: parts for name, parts in what.choices.items() if parts.get_default("small")}
    bench.set_defaults(command_name="bench", handler=_bench, benches=small)


def _bench(options: argparse.Namespace) -> None:
    if options.quick:
        _quick(options)
        return
    if options.check or options.write or not options.what:
        raise UserError("bench: wanted WHAT, or --quick, alone or with --check or --write; see --help")
    from captionscale.tools.bench import race

    race.show(options.what, options.measure(options), as_json=options.json)


def _quick(options: argparse.Namespace) -> None:
    from captionscale.tools.bench import check

    benches = options.benches
    if options.what:
        if options.what not in benches:
            raise UserError(f"bench --quick {options.what}: {did_you_mean(options.what, benches)}")
        benches = {options.what: benches[options.what]}
        usual = vars(benches[options.what].parse_args([]))
        if changed := [key for key, value in usual.items() if getattr(options, key) != value]:
            raise UserError(
                f"bench --quick {options.what}: --quick sets all sizes, wanted no {' or '.join(changed)};"
                " leave one of them out"
            )
    benches = {name: parts.get_default("small") for name, parts in benches.items()}
    check.quick(benches, check=options.check, write=options.write, as_json=options.json)


def _pack(options: argparse.Namespace) -> "list[Heat]":
    from captionscale.tools.bench import pack

    return pack.bench(options.images, options.folder, count=options.count, rounds=options.rounds)


def _data(options: argparse.Namespace) -> "list[Heat]":
    from captionscale.tools.bench import data

    return data.bench(options.images, options.folder, count=options.count, rounds=options.rounds)


def _start(options: argparse.Namespace) -> "list[Heat | Sheet]":
    from captionscale.tools.bench import start

    return start.bench(rounds=options.rounds)


def _save(options: argparse.Namespace) -> "list[Heat]":
    from captionscale.tools.bench import save

    return save.bench(load_config(options), options.folder, rounds=options.rounds)


def _step(options: argparse.Namespace) -> "list[Heat | Sheet]":
    from captionscale.tools.bench import step

    config = load_config(options) if options.config else None
    return step.bench(config, images=options.images, rounds=options.rounds)


def _score(options: argparse.Namespace) -> "list[Heat | Sheet]":
    from captionscale.tools.bench import score

    return score.bench(options.captions, options.references, count=options.count, rounds=options.rounds)


def _reward(options: argparse.Namespace) -> "list[Heat]":
    from captionscale.tools.bench import reward

    return reward.bench(options.references, rounds=options.rounds)


def _decode(options: argparse.Namespace) -> "list[Heat]":
    from captionscale.tools.bench import decode

    return decode.bench(options.run, images=options.images, rounds=options.rounds)


def _scst(options: argparse.Namespace) -> "list[Sheet]":
    from captionscale.tools.bench import scst

    return scst.bench(options.run, images=options.images, rounds=options.rounds)


def _order(options: argparse.Namespace) -> "list[Sheet]":
    from captionscale.tools.bench import order

    return order.bench(options.shards, options.split)


def _scale(options: argparse.Namespace) -> "list[Heat | Sheet]":
    from captionscale.tools.bench import scale

    config = load_config(options) if options.config else None
    return scale.bench(config, step_ms=options.step_ms, gpu=options.gpu_name, rounds=options.rounds)
