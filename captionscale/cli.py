"""The command line. Each verb imports what it needs, so that `--help` is instant."""

import argparse
import io
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captionscale.arguments import parser
from captionscale.errors import PreemptedError, UserError

if TYPE_CHECKING:
    from captionscale.config import Config
    from captionscale.data.places import Place


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; an error that the user can fix is one line and exit code 1."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # Its number would go to the next file that is opened, and what we say into that file.
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: PTH123, SIM115
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
        raise SystemExit(128 + signal.SIGPIPE) from None
    except UserError as error:
        _fail(str(error))
    except PreemptedError as error:
        if str(error):
            _fail(f"{error}; the same command goes on", code=PreemptedError.CODE)
        raise SystemExit(PreemptedError.CODE) from None
    except OSError as error:
        _fail(
            f"{error.filename or 'system'}: {error.strerror or error};"
            " check the path, its rights and the free space"
        )
    except RuntimeError as error:
        if not any(transport in str(error) for transport in ("gloo", "NCCL")):
            raise
        reason = str(error).splitlines()[0]
        _fail(f"a rank that this one waited for is gone; it, or its launcher, tells why ({reason})")
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
    from captionscale.data.places import open_place

    with tempfile.TemporaryDirectory(prefix="captionscale-") as fresh:
        # What a URL gives now, not what an earlier download left.
        _verify_place(open_place(options.shards, Path(fresh)), options)


def _verify_place(place: "Place", options: argparse.Namespace) -> None:
    from captionscale.data.places import manifest_of
    from captionscale.data.verification import verify
    from captionscale.files import cores
    from captionscale.progress import progress, say

    splits = manifest_of(place).splits
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
    print(f"image {options.image_id}  {_printable(sample.file)}  split {split.name}")
    print(f"{look.width} x {look.height} pixels, {len(data):,} bytes of {look.extension}")
    for caption in sample.captions:
        print(f"  {_printable(caption)}")
    if options.save:
        options.save.write_bytes(data)


def _printable(text: str) -> str:
    """Return a text without what moves the cursor, or does worse, to a terminal."""
    return "".join(it if it.isprintable() else repr(it)[1:-1] for it in text)


def _stats(options: argparse.Namespace) -> None:
    from captionscale.data.places import open_place
    from captionscale.tools.stats import print_stats

    print_stats(open_place(options.shards), min_count=options.min_count, plot=options.plot)


def _train(options: argparse.Namespace) -> None:
    settings = _settings(options)

    from captionscale.train import preempt

    # From here on: it takes seconds to import what trains.
    with preempt.listening(settings.train.grace_s):
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
    launch(
        command,
        profile=options.profile,
        processes=options.processes,
        dry_run=options.dry_run,
        logs=options.logs,
        settings=_settings(inner) if inner.verb == "train" else None,
    )


def _submit(options: argparse.Namespace) -> None:
    from captionscale.tools.submit import submit

    submit(
        _settings(options),
        options.out or Path("runs", Path(options.config).stem),
        nodes=options.nodes,
        gpus=options.gpus,
        time=options.time,
        profile=options.profile,
        dry_run=options.dry_run,
    )


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
    from captionscale.tools.bench import order, pack, race, save, step

    tables: list[race.Heat | race.Sheet] = []
    if options.what == "save":
        tables += save.bench(_settings(options), options.folder, rounds=options.rounds)
    elif options.what == "step":
        tables += step.bench(_settings(options) if options.config else None, rounds=options.rounds)
    elif options.what == "order":
        tables += order.bench(options.shards, options.split)
    else:
        tables += pack.bench(options.images, options.folder, count=options.count, rounds=options.rounds)
    race.show(tables, as_json=options.json)


def _drill(options: argparse.Namespace) -> None:
    from captionscale.tools.drill import drill

    same = drill(
        _settings(options),
        options.out,
        profile=options.profile,
        ranks=options.ranks,
        kills=options.kills,
        steps=options.steps,
        seed=options.seed,
    )
    if not same:
        raise SystemExit(1)


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
    "submit": _submit,
    "caption": _caption,
    "score": _score,
    "drill": _drill,
    "bench": _bench,
    "config": _config,
    "quickstart": _quickstart,
}
