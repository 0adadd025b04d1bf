"""Every C++ program that a README shows compiles against the public headers, without a warning."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpp
ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ("README.md", "runtime/cpp/README.md")
PROGRAMS = [
    (page, program)
    for page in PAGES
    for program in re.findall(r"^```cpp\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
]
HEADERS = sorted((ROOT / "runtime" / "cpp" / "include" / "edgedistill").iterdir())


def compile_check(source: str, *options: str) -> str:
    command = [*options, "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-"]
    include = f"-I{ROOT / 'runtime' / 'cpp' / 'include'}"
    return subprocess.run([*command, include], input=source, capture_output=True, text=True).stderr


@pytest.mark.parametrize(("page", "program"), PROGRAMS, ids=[page for page, _ in PROGRAMS])
def test_programs_of_the_readmes_compile(page: str, program: str) -> None:
    assert compile_check(program, "g++", "-std=c++17", "-x", "c++") == ""


def test_both_pages_show_a_program() -> None:
    assert {page for page, _ in PROGRAMS} == set(PAGES)


@pytest.mark.parametrize("header", HEADERS, ids=[header.name for header in HEADERS])
def test_every_header_stands_alone(header: Path) -> None:
    assert compile_check(f"#include <edgedistill/{header.name}>\n", "g++", "-std=c++17", "-x", "c++") == ""


def test_the_c_header_is_c11() -> None:
    assert compile_check("#include <edgedistill/edgedistill.h>\n", "gcc", "-std=c11", "-x", "c") == ""


def test_no_public_header_names_a_library_below() -> None:
    for header in HEADERS:
        assert not re.search(r"\b(ov|cv|nlohmann)::|#include <(?!edgedistill/|std)[^>]*[/.]", header.read_text()), (
            header.name
        )
