"""The docs against the code: nothing is left out, and nothing is named that there is not.

What the code in them does is tried in ``tests/integration/test_docs.py``; links between pages, and
what docstrings refer to, by ``make docs``.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

import celery_jetstream
from celery_jetstream import exceptions, outcomes, signals
from celery_jetstream.cli import jetstream
from celery_jetstream.config import Config
from tests.markdown import ROOT, blocks, excerpts

DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
PAGES = pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
REFERENCE = ROOT / "docs/reference"

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


@PAGES
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs/index.md"
    links = re.findall(r"\]\(([^)#:]+)", index.read_text("utf-8"))
    there = {(index.parent / link).resolve() for link in links}
    missing = [page for page in DOCS if (ROOT / "docs") in page.parents and page != index]
    missing = [str(page.relative_to(ROOT)) for page in missing if page not in there]
    assert not missing, f"add a row to docs/index.md for each of {missing}"


# -- the reference ---------------------------------------------------------------------------------


def test_the_commands_are_as_the_reference_has_them() -> None:
    spec = importlib.util.spec_from_file_location("docs_cli", ROOT / "docs/cli.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    written = writer.PAGE.read_text("utf-8")
    assert written == writer.page(), "run `python docs/cli.py`: it writes docs/reference/cli.md"


def test_every_option_says_what_it_does() -> None:
    silent = [
        f"{path} {option.opts[0]}"
        for path, command in _commands(jetstream)
        if path != "worker"
        for option in command.params
        if isinstance(option, click.Option) and not option.help and option.opts[0].startswith("--")
    ]
    assert not silent, f"give help= to {silent}"


def _commands(group: click.Group, path: str = "") -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += _commands(command, f"{path}{name} ")
        else:
            found.append((path + name, command))
    return found


def test_every_signal_is_documented_with_its_arguments() -> None:
    """``providing_args`` is what the table has to say."""
    rows = _rows(REFERENCE / "signals.md")
    documented = {row[0]: set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    there = {name: set(getattr(signals, name).providing_args) for name in signals.__all__}
    wrong = {name: sorted(there[name]) for name in there if documented.get(name) != there[name]}
    assert not wrong, f"rows of docs/reference/signals.md, with these arguments: {wrong}"
    assert documented.keys() <= there.keys(), documented.keys() - there.keys()


def test_every_exception_is_documented_below_the_one_it_is() -> None:
    rows = _rows(REFERENCE / "errors.md")
    documented = {row[0]: row[1] for row in rows if row[0][:1].isupper()}
    classes = {name: getattr(exceptions, name) for name in exceptions.__all__}
    classes = {name: found for name, found in classes.items() if isinstance(found, type)}
    missing, gone = classes.keys() - documented.keys(), documented.keys() - classes.keys()
    assert not missing, f"add rows to docs/reference/errors.md (class, when, what to do): {missing}"
    assert not gone, f"docs/reference/errors.md has what is no more: {gone}"
    text = (REFERENCE / "errors.md").read_text("utf-8")
    for name, found in classes.items():
        for base in found.__bases__:
            if base.__name__ not in ("CeleryJetStreamError", "Exception"):
                first = re.search(rf"^\| `{name}`([^|]*)\|", text, re.MULTILINE)
                assert first is not None
                assert f"`{base.__name__}`" in first[1], f"its row: {name} is a {base.__name__}"


def test_every_error_code_that_decides_is_documented() -> None:
    text = (REFERENCE / "errors.md").read_text("utf-8")
    found = re.findall(r"^\| (10\d+) \| [^|]+ \| ([^|]+) \| [^|]+ \|$", text, re.MULTILINE)
    documented = {int(code): verdict for code, verdict in found}
    there = {code: v.value.replace("_", " ") for code, v in outcomes.BY_ERROR_CODE.items()}
    wrong = {code: there[code] for code in there if documented.get(code) != there[code]}
    assert not wrong, f"rows of docs/reference/errors.md, with these verdicts: {wrong}"
    assert documented.keys() <= there.keys(), documented.keys() - there.keys()


def test_every_verdict_is_documented() -> None:
    documented = {row[0] for row in _rows(REFERENCE / "errors.md")}
    missing = {verdict.value for verdict in outcomes.Verdict} - documented
    assert not missing, f"rows of 'Whose fault it is' in docs/reference/errors.md: {missing}"


def test_every_metric_is_documented() -> None:
    if importlib.util.find_spec("celery_jetstream.catalogue") is None:
        pytest.skip("there are no metrics yet")
    from celery_jetstream.catalogue import METRICS

    page = REFERENCE / "metrics.md"
    text = page.read_text("utf-8") if page.exists() else ""
    missing = [name for metric in METRICS if f"`{(name := metric.full_name)}" not in text]
    assert not missing, f"add rows to docs/reference/metrics.md: {missing}"


def test_what_the_package_exports_is_in_the_api() -> None:
    text = (REFERENCE / "api.md").read_text("utf-8")
    inside = "CeleryJetStreamError", "__version__"  # with the other exceptions; said by the title
    names = set(celery_jetstream.__all__) - set(inside)
    missing = [
        name for name in names if not re.search(rf"^\.\. auto\w+:: .*\b{name}\b", text, re.M)
    ]
    assert not missing, f"add `.. autoclass::` or `.. autofunction::` to api.md: {missing}"


def _rows(page: Path) -> list[list[str]]:
    """The rows of a page's tables whose first cell begins with a name in code."""
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("| `")
    ]
    return [[row[0].split("`")[1], *row[1:]] for row in cells]


# -- what they show --------------------------------------------------------------------------------


@PAGES
def test_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        block.compile()


def test_few_blocks_are_excerpts() -> None:
    found = [f"{block.where}: {block.excerpt}" for page in DOCS for block in excerpts(page)]
    assert len(found) <= 12, "\n".join(["code that is not run may be wrong:", *found])


@PAGES
def test_yaml_is_yaml(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block.code), block.where


@PAGES
def test_commands_are_commands(page: Path) -> None:
    """Each ``celery -A app jetstream …``, in a block or in a line: its words and its options."""
    text = page.read_text("utf-8")
    shell = [line for block in blocks(page, "", "sh", "bash", "console") for line in block.lines()]
    found = [*shell, *re.findall(r"`([^`\n]+)`", text)]
    faults = [f"{line!r}: {fault}" for line in found if (fault := _fault(line))]
    assert not faults, "\n".join(
        [f"{page.relative_to(ROOT)} against celery_jetstream.cli:", *faults]
    )


def _fault(line: str) -> str:
    """What is wrong with the first command of ours in a line; "" where nothing is."""
    called = re.search(r"celery -A \S+ jetstream (.*)", line)
    if called is None:
        return ""
    words = shlex.split(re.split(r" [#&|>;]|…|'\)", called[1])[0].replace("[", "").replace("]", ""))
    command: click.Command = jetstream
    while words and isinstance(command, click.Group) and re.fullmatch(r"[a-z_]+", words[0]):
        name = words.pop(0)
        if name not in command.commands:
            return f"there is no {name!r} among {sorted(command.commands)}"
        command = command.commands[name]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    options = [word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1]
    unknown = [option for option in options if option not in known and option != "--help"]
    return f"it has no {unknown}, but {sorted(known)}" if unknown else ""


@PAGES
def test_make_has_the_targets_that_are_named(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = page.read_text("utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))
    assert named <= targets, named - targets
