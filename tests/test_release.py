"""What a release says of itself, in one voice: version, citation, changelog, forms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import itune

FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.M)
    assert newest is not None
    assert newest[1] in (itune.__version__, "Unreleased")
    assert CITATION["version"] == itune.__version__
    minor = ".".join(itune.__version__.split(".")[:2])
    assert f"{minor}.x today" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_citation_has_what_its_format_needs() -> None:
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert all("name" in author or "family-names" in author for author in CITATION["authors"])
    licence = re.search(r'^license = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert licence is not None
    assert CITATION["license"] == licence[1]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_has_what_the_forge_needs(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in asked]
    assert len(names) == len(set(names)) > 2
    assert all(field["attributes"]["label"] for field in asked)


def test_there_are_forms() -> None:
    assert {path.stem for path in FORMS} == {"config", "fault", "wish"}


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(itune.__file__).parent / "py.typed").is_file()
