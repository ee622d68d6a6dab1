"""The docs against the code, where a table can be compared."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from celery_jetstream.config import Config

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]

ROW = re.compile(r"^\| `jetstream_(\w+)` \| (.+?) \| (.*?) ?\| (.+) \|$", re.MULTILINE)
SETTINGS = {
    name: (default, unit, meaning)
    for name, default, unit, meaning in ROW.findall(
        (ROOT / "docs/reference/settings.md").read_text("utf-8")
    )
}
FIELDS = {field.name: field.metadata for field in dataclasses.fields(Config)}


def test_every_setting_is_documented_and_no_other() -> None:
    assert sorted(SETTINGS) == sorted(FIELDS)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_documented_default_is_the_one(name: str) -> None:
    documented, default = SETTINGS[name][0], FIELDS[name]["default"]
    if default == "":
        assert documented == "must be set"
    elif name == "unrecoverable_errors":
        assert documented == ", ".join(f"`{error.__name__}`" for error in default)
    else:
        assert ast.literal_eval(documented.strip("`")) == default


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_duration_names_its_unit(name: str) -> None:
    is_duration = bool(re.search(r'"\d+(ms|s|m|h|d)"', FIELDS[name]["good"]))
    assert (SETTINGS[name][1] == "seconds") == is_duration


def test_the_readme_names_only_settings_that_there_are() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"\bjetstream_([a-z_]+)", text)) - {"handler"}
    assert named <= FIELDS.keys(), named - FIELDS.keys()


def test_every_module_is_a_station() -> None:
    """The table of the architecture has every module of the package."""
    text = (ROOT / "docs/explanation/architecture.md").read_text("utf-8")
    modules = {file.stem for file in (ROOT / "celery_jetstream").glob("[a-z]*.py")}
    missing = {module for module in modules if f"`{module}`" not in text}
    assert not missing


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
