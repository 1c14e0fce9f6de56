"""The README's examples are true."""

import re
import shlex
from pathlib import Path

import click
import pytest

from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.main import main
from hexgen2.config import load
from hexgen2.errors import ConfigError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("hexgen2 ")
]


def test_the_configuration_example_loads(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    file = tmp_path / "fleet.yaml"
    file.write_text(example)
    assert load(file, FleetConfig).decode == 2


def test_the_mistake_is_told_as_shown(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^fleet\.yaml:.*$", README, flags=re.MULTILINE)
    file = tmp_path / "fleet.yaml"
    file.write_text("decode: 2\nengine:\n  kind: vllm\n  modle: /models/SmolLM2-135M-Instruct\n")
    with pytest.raises(ConfigError) as caught:
        load(file, FleetConfig)
    assert str(caught.value) == f"{tmp_path}/{shown}"


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_take_what_is_shown(arguments: list[str]) -> None:
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(command.name, arguments)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
