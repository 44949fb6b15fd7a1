"""`python shards/pack.py` is `captionscale pack`, from a bare checkout too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from captionscale.cli import main

main(["pack", *sys.argv[1:]])
