"""The reference pages hold every setting and command, and what the documentation tells to type is understood."""

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown import Markdown

from conf.schema import Config
from docs.settings_page import COMMANDS, commands_page, settings_page
from launch.help_text import documented_settings
from launch.overrides import preset_groups
from launch.settings import setting_types

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = {
    "launch/train.sh": Config,
    "launch.train": Config,
    **{f"launch.{name}": schema for name, schema in COMMANDS.items() if schema},
}
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "slurm/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))


class Definitions(HTMLParser):
    """The text of each <dd> by the id in the <dt> before it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._id, self._inside = "", False
        self.feed(Markdown(extensions=["def_list", "attr_list"]).convert(page))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "span":
            self._id = dict(attrs)["id"] or ""
            assert self._id not in self.found
        if tag == "dd":
            self.found[self._id], self._inside = "", True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "dd"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[self._id] += data


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def test_the_page_has_every_setting_of_a_run_with_its_docstring() -> None:
    shown = Definitions(settings_page()).found
    expected = {key: plain(text) for key, _, text in documented_settings(Config)}
    assert {key: plain(text) for key, text in shown.items()} == expected


def test_the_page_says_every_default() -> None:
    page = settings_page()
    for key, default, _ in documented_settings(Config):
        assert re.search(rf">`{re.escape(key)}`</span> \(default `{re.escape(default)}`", page), key


def test_the_page_of_commands_has_every_command_and_setting() -> None:
    page = commands_page()
    written = {path.stem for path in (ROOT / "launch").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert written - {"train", "verdict"} == COMMANDS.keys()  # the latter is for the batch script
    shown = Definitions(page).found
    for name, schema in COMMANDS.items():
        assert f"\n## launch.{name}\n" in page
        run = {key for key, *_ in documented_settings(Config)} if schema and issubclass(schema, Config) else set()
        for key, _, text in documented_settings(schema) if schema else []:
            assert key in run or plain(shown[f"{name}.{key}"]) == plain(text)
    assert {"check.ranks", "plan.ranks", "plan.plan.imbalance"} <= shown.keys()


def typed(document: str) -> list[tuple[str, str]]:
    """(command, override) of every override in the shell blocks of a document."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            command = next((word for word in words if word in SCHEMAS), None)
            if command:
                found += [(command, word) for word in words[words.index(command) :] if re.match(r"[a-z_.]+=", word)]
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_documentation_name_settings_that_exist(document: str) -> None:
    for command, override in typed(document):
        key = override.partition("=")[0]
        groups = preset_groups() if issubclass(SCHEMAS[command], Config) else set()
        assert key in setting_types(SCHEMAS[command]) or key in groups, f"{command} {override}"


def test_overrides_are_found_in_the_documentation() -> None:
    assert ("launch/train.sh", "train.steps=200") in typed("README.md")
    assert ("launch.check", "parallel.ep=8") in typed("docs/guides/layouts.md")
