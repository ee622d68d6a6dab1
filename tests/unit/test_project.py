"""The project's own promises: one version, light imports, a command that Celery finds."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

import celery_jetstream

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_installed_one():
    assert importlib.metadata.version("celery-jetstream") == celery_jetstream.__version__


def test_what_is_exported_is_there():
    absent = [name for name in celery_jetstream.__all__ if not hasattr(celery_jetstream, name)]
    assert absent == []


def test_importing_the_package_loads_no_database_and_no_redis():
    program = (
        "import sys; from celery_jetstream import *; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "celery_jetstream" in loaded
    assert not {"sqlalchemy", "redis", "pytest", "rich"} & set(loaded)


def test_having_the_package_costs_who_does_not_use_it_nothing():
    """Every pytest run imports the plugin."""
    program = "import sys, celery_jetstream.contrib.pytest; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "celery_jetstream.contrib.pytest" in loaded
    assert not {"celery", "kombu", "nats", "sqlalchemy"} & set(loaded)


def test_a_module_is_an_attribute_before_anything_is_used():
    program = "import celery_jetstream; celery_jetstream.signals.event_built"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'publish'"):
        celery_jetstream.publish  # noqa: B018
    assert set(celery_jetstream.__all__) <= set(dir(celery_jetstream))


def test_pytest_finds_the_plugin():
    """By its module's name: then ``-p`` and ``pytest_plugins`` do not register it twice."""
    _, _, table = (ROOT / "pyproject.toml").read_text().partition("pytest11]\n")
    name, module = re.match(r'"(.+)" = "(.+?)"', table).groups()
    assert name == module == "celery_jetstream.contrib.pytest"


def test_celery_finds_the_command():
    (entry_point,) = importlib.metadata.entry_points(group="celery.commands", name="jetstream")
    command = entry_point.load()
    assert isinstance(command, click.Group)
    assert "bridge" in command.commands


def test_celery_shows_the_command_in_its_help():
    shown = subprocess.run(
        [sys.executable, "-m", "celery", "--help"], capture_output=True, text=True, check=True
    )
    assert re.search(r"^\s+jetstream\b", shown.stdout, re.MULTILINE)


def test_the_package_is_marked_as_typed():
    assert (ROOT / "celery_jetstream" / "py.typed").is_file()


def test_the_lock_names_no_host_and_no_path():
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^-|^\s*/|file:", lock, re.MULTILINE)


@pytest.mark.parametrize("name", ["docker-compose.yml", ".pre-commit-config.yaml"])
def test_a_configuration_is_valid_yaml(name):
    assert yaml.safe_load((ROOT / name).read_text())


def test_composed_ports_are_only_for_this_machine():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_module_has_a_place_in_the_import_contract():
    pyproject = (ROOT / "pyproject.toml").read_text()
    _, _, layers = pyproject.partition("layers = [")
    placed = set(re.findall(r"\w+", layers.partition("\n]")[0]))
    modules = {path.stem for path in (ROOT / "celery_jetstream").glob("*.py")} - {"__init__"}
    assert modules <= placed
