"""The command line. Each verb imports what it needs, so that `--help` is instant."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from captionscale.arguments import parser
from captionscale.errors import UserError

if TYPE_CHECKING:
    from captionscale.config import Config


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; an error that the user can fix is one line and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Captions hold any letter, also where the terminal does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    try:
        _VERBS[options.verb](options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough, as `head` does; nor can the interpreter flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(
            f"{error.filename or 'system'}: {error.strerror or error};"
            " check the path, its rights and the free space"
        )
    except KeyboardInterrupt:
        _fail(
            "stopped by Ctrl-C; what was finished is kept, and the same command goes on from there", code=130
        )


def _fail(text: str, code: int = 1) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"captionscale: {'' if rank == '0' else f'rank {rank}: '}{text}", file=sys.stderr)
    raise SystemExit(code)


def _pack(options: argparse.Namespace) -> None:
    from captionscale.tools.packer import pack

    pack(options)


def _verify(options: argparse.Namespace) -> None:
    from captionscale.data import manifest
    from captionscale.data.places import open_place
    from captionscale.data.verification import verify
    from captionscale.files import cores
    from captionscale.progress import progress, say

    place = open_place(options.shards)
    splits = manifest.fetch(place.fetch, str(place)).splits
    with progress("verifying", sum(facts.images for facts in splits.values())) as bar:
        found = verify(
            place,
            deep=options.deep,
            allow_leaks=options.allow_leaks,
            workers=options.workers or cores(),
            progress=bar.advance,
        )
    for note in found.notes:
        say(f"note: {note}")
    if found.problems:
        raise UserError(
            "\n".join([*found.problems, f"{options.shards}: NOT as packed; problems: {len(found.problems)}"])
        )
    counts = ", ".join(f"{name} {facts.images:,}" for name, facts in splits.items())
    print(f"{options.shards}: as packed: images: {counts}")


def _show(options: argparse.Namespace) -> None:
    from captionscale.data import images, shards
    from captionscale.data.places import open_place

    split, item = shards.find(open_place(options.shards), options.image_id)
    data = split.image(item)
    look = images.look(data, f"image {options.image_id}", whole=True)
    sample = split.sample(item)
    print(f"image {options.image_id}  {sample.file}  split {split.name}")
    print(f"{look.width} x {look.height} pixels, {len(data):,} bytes of {look.extension}")
    for caption in sample.captions:
        # A control character may move the cursor or worse; it is shown instead.
        print("  " + "".join(it if it.isprintable() else repr(it)[1:-1] for it in caption))
    if options.save:
        options.save.write_bytes(data)


def _stats(options: argparse.Namespace) -> None:
    from captionscale.data.places import open_place
    from captionscale.tools.stats import print_stats

    print_stats(open_place(options.shards), min_count=options.min_count, plot=options.plot)


def _train(options: argparse.Namespace) -> None:
    settings = _settings(options)

    from captionscale.train.loop import train

    train(settings, options.out)


def _settings(options: argparse.Namespace) -> "Config":
    from captionscale import config

    return config.load(options.config, options.changes)


def _launch(options: argparse.Namespace) -> None:
    from captionscale.tools.launcher import launch

    command = options.command[options.command[:1] == ["--"] :]
    # What no process can do is refused here, once, and not by each of them.
    inner = parser().parse_args(command)
    if inner.verb == "train":
        _settings(inner)
    launch(command, profile=options.profile, processes=options.processes, dry_run=options.dry_run)


def _caption(options: argparse.Namespace) -> None:
    from captionscale.score.evaluate import caption_files
    from captionscale.tools.scoring import caption_run
    from captionscale.train.checkpoint import open_run

    if bool(options.images) == bool(options.split) or bool(options.split) != bool(options.out):
        raise UserError("caption: wanted either RUN IMAGE ..., or RUN --split NAME --out RESULTS")
    if options.split:
        count = caption_run(
            options.run,
            options.split,
            checkpoint=options.checkpoint,
            beam=options.beam,
            shards=options.shards,
            out=options.out,
        )
        if count is not None:
            print(f"{options.out}: {count:,} captions, in COCO's results format")
        return
    saved = open_run(options.run, options.checkpoint)
    captions = caption_files(
        saved.captioner(), options.images, saved.vocabulary(), saved.config().with_beam(options.beam)
    )
    for path, caption in zip(options.images, captions, strict=True):
        print(f"{path}\t{caption}")


def _score(options: argparse.Namespace) -> None:
    from captionscale.tools.scoring import score_file, score_run

    if options.run is not None and not (options.captions or options.references):
        if not options.split:
            raise UserError(f"score {options.run}: no --split; say which, such as --split val")
        scores, receipt = score_run(
            options.run,
            options.split,
            checkpoint=options.checkpoint,
            beam=options.beam,
            shards=options.shards,
            receipt=options.out,
        )
    elif options.run is None and options.captions and options.references:
        scores, receipt = score_file(options.captions, options.references, options.out), options.out
    else:
        raise UserError("score: wanted either RUN --split NAME, or --captions RESULTS --references CAPTIONS")
    if scores is not None:
        for name, value in scores.values.items():
            print(f"{name:8} {value:.10f}")
        print(f"{len(scores.image_ids):,} images{f'; receipt: {receipt}' if receipt else ''}")


def _bench(options: argparse.Namespace) -> None:
    from captionscale.tools.bench import pack, race

    heats = pack.bench(options.images, options.folder, count=options.count, rounds=options.rounds)
    race.show(heats, as_json=options.json)


def _config(options: argparse.Namespace) -> None:
    from captionscale import assets, config

    if options.config is None:
        print("\n".join(assets.names("configs", ".toml")))
    else:
        print(config.dumps(_settings(options)), end="")


def _quickstart(options: argparse.Namespace) -> None:
    from captionscale.tools.quickstart import quickstart

    quickstart(options.out)


_VERBS = {
    "pack": _pack,
    "verify": _verify,
    "show": _show,
    "stats": _stats,
    "train": _train,
    "launch": _launch,
    "caption": _caption,
    "score": _score,
    "bench": _bench,
    "config": _config,
    "quickstart": _quickstart,
}
