"""A hook of mkdocs: pages keep the places that they have in the checkout, so that a link is right in both.

Pages are `docs/` and the READMEs of the folders; the README is the front page. What a page links to besides,
such as a file of source, comes along as it is.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "launch/README.md", "shards/README.md", "slurm/README.md")
_LINK = re.compile(r"\]\(([^)#:]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the theme's files, and the checkout's under their own names."""

    def add(place: str) -> None:
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
        if file.inclusion.is_included():
            add(f"docs/{file.src_uri}")
    for place in OUTSIDE:
        add(place)
    for page in files.documentation_pages():
        folder = (ROOT / page.src_uri).parent
        for link in _LINK.findall(page.content_string):
            path = (folder / link).resolve()
            if path.is_file() and path.is_relative_to(ROOT):
                place = path.relative_to(ROOT).as_posix()
                if files.get_file_from_path(place) is None:
                    add(place)
    return files
