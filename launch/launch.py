"""`python launch/launch.py` is `captionscale launch`, from a bare checkout too."""

import os
import sys
from pathlib import Path

checkout = str(Path(__file__).parents[1])
sys.path.insert(0, checkout)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))
from captionscale.cli import main  # noqa: E402

main(["launch", *sys.argv[1:]])
