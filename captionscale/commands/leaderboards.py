"""The commands that put scores side by side, here and on the leaderboards."""

import argparse
from pathlib import Path

from captionscale.commands.arguments import Subparsers


def add(subparsers: Subparsers) -> None:
    """Add them to the command line."""
    board = subparsers.add_parser(
        "board", help="show receipts side by side, and what others published, as a page"
    )
    board.add_argument(
        "receipts", type=Path, nargs="+", metavar="RECEIPTS", help="files, or folders that hold receipt.json"
    )
    board.add_argument(
        "--out", type=Path, default=Path("board.html"), metavar="PAGE", help="(default: %(default)s)"
    )
    board.set_defaults(command_name="board", handler=_board)

    leaderboard = subparsers.add_parser(
        "leaderboard", help="write the files that COCO's and nocaps' servers take"
    )
    leaderboard.add_argument(
        "--eval-set",
        required=True,
        dest="board",
        help="coco2014-val, coco2014-test, coco2017-test, nocaps-val or nocaps-test",
    )
    leaderboard.add_argument(
        "--captions", type=Path, nargs="+", required=True, metavar="RESULTS", help="COCO results, or parts"
    )
    leaderboard.add_argument(
        "--images",
        type=Path,
        metavar="LIST",
        help="the set's official list, such as image_info_test2014.json",
    )
    leaderboard.add_argument("--name", required=True, metavar="ALGORITHM", help="part of the files' names")
    leaderboard.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for the files of one algorithm"
    )
    leaderboard.set_defaults(command_name="leaderboard", handler=_leaderboard)


def _board(options: argparse.Namespace) -> None:
    from captionscale.tools.board import write_board

    tables = write_board(options.receipts, options.out)
    receipts = sum(len(table.entries) for table in tables)
    said = f"{options.out}: {receipts} receipt{'s' * (receipts != 1)}"
    if len(tables) > 1:
        said += f" in {len(tables)} tables: other references, or measured otherwise, are not ranked together"
    print(said)


def _leaderboard(options: argparse.Namespace) -> None:
    from captionscale.tools.leaderboard import write_submission

    done = write_submission(options.board, options.captions, options.images, options.name, options.out)
    empty = f", {done.empty:,} of them empty" if done.empty else ""
    print(f"{done.file}: {done.captions:,} captions{empty}, one for each image of {options.board}")
    if done.upload:
        print(f"upload {done.upload}")
    else:
        print(
            f"not to upload yet: its archive needs {done.missing_set} too, by --eval-set {done.missing_set}"
        )
