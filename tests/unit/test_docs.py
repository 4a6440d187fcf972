"""The pages say what is true: commands parse, files and links exist, calls, limits and settings are all there."""

import argparse
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysys.cli import build_parser
from raysys.serve.api import LIMITS
from raysys.serve.app import AppArgs
from raysys.serve.http import create_app
from raysys.serve.metrics import Metrics
from raysys.serve.settings import FAST_SETTINGS
from raysys.serve.trouble import Trouble

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
README = TEXTS["README.md"]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def commands() -> dict[str, argparse.ArgumentParser]:
    action = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def fenced_commands(text: str) -> list[list[str]]:
    """Arguments of every `raysys ...` and `python jobs/NAME.py ...` in the code blocks of a page."""
    found = []
    for block in FENCE.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            job = re.search(r"python jobs/(\w+)\.py\b(.*)", line)
            if job:
                source = (ROOT / "jobs" / f"{job[1]}.py").read_text()
                command = re.search(r'main\(\["([\w-]+)"', source)
                assert command, f"jobs/{job[1]}.py calls no command"
                found.append([command[1], *shlex.split(job[2], comments=True)])
            elif line.startswith("raysys "):
                found.append(shlex.split(line, comments=True)[1:])
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_commands_of_the_pages_parse(page):
    for arguments in fenced_commands(TEXTS[page]):
        try:
            build_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page}: `raysys {' '.join(arguments)}` does not parse")


@pytest.mark.parametrize("page", TEXTS)
def test_commands_and_flags_in_the_text_exist(page):
    known = commands()
    for text in INLINE.findall(FENCE.sub("", TEXTS[page])):
        if not text.startswith("raysys "):
            continue
        words = text.split()
        if words[1] == "NAME" or words[1] == "...":
            continue
        assert words[1] in known, f"{page}: no command in `{text}`"
        flags = {flag for action in known[words[1]]._actions for flag in action.option_strings}
        wrong = [word for word in words if word.startswith("-") and word not in flags]
        assert not wrong, f"{page}: `{text}` has no {wrong}"


def test_every_block_was_read():
    """The two tests above would pass on pages without commands."""
    assert len(fenced_commands(README)) >= 10
    assert len(fenced_commands(TEXTS["docs/your-data.md"])) >= 5


def test_every_command_and_job_is_documented():
    everything = "\n".join(TEXTS.values())
    missing = [name for name in commands() if f"raysys {name}" not in everything]
    jobs = [path.name for path in sorted((ROOT / "jobs").glob("*.py")) if f"jobs/{path.name}" not in README]
    assert missing == [] and jobs == []


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in LINK.findall(TEXTS[page]):
        if "://" not in target and not target.startswith("#"):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), f"{page}: {target}"


def readme_tree() -> list[tuple[Path, str]]:
    """(path, its line) of the entries of the README's tree, and of the files that a folder's lines name."""
    block = next(block for block in FENCE.findall(README) if block.startswith("raysys/\n"))
    entries, package, folder = [], ROOT, ROOT
    for line in block.splitlines():
        entry = re.match(r"( {0,2})([\w.-]+/?)(\s{2,}|$)(.*)", line)
        rest = line
        if entry:
            package = ROOT if not entry[1] else package
            path = package / entry[2]
            entries.append((path, line))
            if not entry[1] and entry[2] == "raysys/":
                package = path
            folder = path if entry[2].endswith("/") else path.parent
            rest = entry[4]
        if folder not in (ROOT, ROOT / "raysys"):
            entries += [(folder / name, line) for name in re.findall(r"[\w-]+\.(?:py|yaml|md)\b", rest)]
    return entries


def test_files_of_the_tree_exist():
    assert len(readme_tree()) > 60
    for path, line in readme_tree():
        assert path.exists(), f"README tree: {line.strip()!r}: {path.relative_to(ROOT)} is not there"


def test_the_tree_names_every_module():
    named = {path for path, _ in readme_tree()}
    modules = [path for path in (ROOT / "raysys").rglob("*.py") if path.name != "__init__.py"]
    assert [str(path.relative_to(ROOT)) for path in modules if path not in named] == []


def test_app_arguments_stand_in_the_serve_config():
    text = (ROOT / "serve_config.yaml").read_text()
    assert [name for name in AppArgs.model_fields if not re.search(rf"^ *#? *{name}:", text, re.M)] == []


def test_calls_limits_and_settings_stand_in_the_serving_page():
    page = TEXTS["docs/serving.md"]
    app = create_app(
        SimpleNamespace(state=None, metrics=Metrics(), trouble=Trouble()),
        SimpleNamespace(post=None),
        models=list,
        not_ready=lambda: None,
        api_key="k",
    )
    calls = [f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods]
    assert len(calls) > 12
    assert [call for call in calls if f"`{call}`" not in page] == []
    values = asdict(LIMITS)
    assert [name for name in values if not re.search(rf"`{name}`[^|]*\| {values[name]:.0f} \|", page)] == []
    assert [name for name in FAST_SETTINGS if name not in page] == []


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_no_path_of_a_private_machine():
    private = re.compile(
        "|".join([r"/wor" + r"k/(main|shared)", r"/tm" + r"p/h/", r"\.\./shar" + "ed", r"/ho" + r"me/(?!ubuntu/|user/)\w+/"])
    )
    for path in tracked_files():
        if path.is_file():
            found = private.search(path.read_bytes().decode(errors="replace"))
            assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"


@pytest.mark.parametrize("page", TEXTS)
def test_no_figure_is_missing(page):
    left = re.findall(r"TBD-[\w-]+|\{\{\w+\}\}", TEXTS[page])
    assert left == [], f"{page} waits for {left}"


@pytest.mark.parametrize("page", TEXTS)
def test_pages_are_ascii(page):
    assert TEXTS[page].isascii()
