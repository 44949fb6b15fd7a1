"""`board` and `leaderboard`: receipts in one table, and files for the servers of COCO and nocaps."""

import argparse
import json
from pathlib import Path

from captionscale.commands.arguments import Commands, add_json


def add(commands: Commands) -> None:
    """Add them to the command line."""
    board = commands.add(
        "board",
        "write a page that compares receipts with each other and with published results",
        _board,
        example="board runs --out board.html",
    )
    board.add_argument(
        "receipts",
        type=Path,
        nargs="+",
        metavar="RECEIPT",
        help="receipt.json files, or folders that hold them",
    )
    board.add_argument(
        "--out", type=Path, default=Path("board.html"), metavar="FILE", help="page (default: %(default)s)"
    )
    add_json(board)

    leaderboard = commands.add(
        "leaderboard",
        "write the files that the servers of COCO and nocaps accept",
        _leaderboard,
        example="leaderboard --eval-set nocaps-val --captions results.json"
        " --image-info nocaps_val_image_info.json --name mine --out upload",
    )
    leaderboard.add_argument(
        "--eval-set",
        required=True,
        help="coco2014-val, coco2014-test, coco2017-test, nocaps-val or nocaps-test",
    )
    leaderboard.add_argument(
        "--captions",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="captions in COCO results format, in one file or in parts",
    )
    leaderboard.add_argument(
        "--image-info",
        type=Path,
        metavar="FILE",
        help="the set's official list of images, such as image_info_test2014.json",
    )
    leaderboard.add_argument(
        "--name", required=True, metavar="ALGORITHM", help="algorithm, a part of the files' names"
    )
    leaderboard.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of this algorithm's files"
    )


def _board(options: argparse.Namespace) -> None:
    from captionscale.tools.board import to_json, write_board

    tables = write_board(options.receipts, options.out)
    if options.json:
        print(json.dumps({"page": str(options.out), "tables": [*map(to_json, tables)]}, indent=1))
        return
    receipts = sum(len(table.entries) for table in tables)
    said = f"{options.out}: {receipts} receipt{'s' * (receipts != 1)}"
    if len(tables) > 1:
        said += f" in {len(tables)} tables: other references, or measured otherwise, are not ranked together"
    print(said)


def _leaderboard(options: argparse.Namespace) -> None:
    from captionscale.tools.leaderboard import write_submission

    done = write_submission(options.eval_set, options.captions, options.image_info, options.name, options.out)
    empty = f", {done.empty:,} of them empty" if done.empty else ""
    print(f"{done.file}: {done.captions:,} captions{empty}, one for each image of {options.eval_set}")
    if done.upload:
        print(f"upload {done.upload}")
    else:
        print(
            f"not to upload yet: its archive needs {done.missing_set} too, by --eval-set {done.missing_set}"
        )
