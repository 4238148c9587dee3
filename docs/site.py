"""MkDocs hooks: pages made from the schema, the packages and Markdown files outside docs/, and links between all."""

import re
import sys
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # which the command mkdocs leaves out

from docs.settings_page import commands_page, settings_page  # noqa: E402

BORROWED = {
    "index.md": "README.md",
    "guides/cluster.md": "slurm/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that are files outside docs/, by their place in the site."""
API = {
    "moe": "The sparse layer",
    "models": "The model",
    "ops": "Operations and their implementations",
    "parallel": "Layouts, process groups and the engine",
}
"""Packages with an API reference, and its title."""
PARALLEL = ("layout", "process_groups", "sharding", "collectives", "engine", "checkpoint")
"""The modules of parallel/ in the API reference; the others are of use to these alone."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not files of docs/."""
    pages = {"reference/settings.md": settings_page(), "reference/commands.md": commands_page()}
    pages |= {f"reference/{package}.md": api_page(package, title) for package, title in API.items()}
    pages |= {page: (ROOT / source).read_text() for page, source in BORROWED.items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def api_page(package: str, title: str) -> str:
    """A page of mkdocstrings' directives, one for each module of a package."""
    modules = sorted(path.stem for path in (ROOT / package).glob("[!_]*.py"))
    if package == "parallel":
        modules = [name for name in PARALLEL if name in modules]
    return f"# {title}\n" + "".join(f"\n::: {package}.{name}\n" for name in modules)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links between files of the repository links between pages. A link to a file that has no page, such as a
    source file, becomes its name; one to a file that does not exist stays, for --strict to find."""
    here = page.file.src_uri
    source = BORROWED.get(here, f"docs/{here}")

    def replace(link: re.Match[str]) -> str:
        text, target, anchor = link["text"], link["target"], link["anchor"] or ""
        path = normpath(f"{source}/../{target}")
        to = next((page for page, borrowed in BORROWED.items() if borrowed == path), path.removeprefix("docs/"))
        if files.get_file_from_path(to):
            return f"[{text}]({relpath(to, here + '/..')}{anchor})"
        return text if (ROOT / path).exists() else link[0]

    return re.sub(r"\[(?P<text>(?:[^]\n]|\n(?!\n))*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)]*)?\)", replace, markdown)
