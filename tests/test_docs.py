"""The pages that come with the program, and the README: every command that they show is run here, or parsed."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
import shutil
import socket
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import structlog

import prime_async
from prime_async.cli import app, main
from prime_async.config.load import config_from
from prime_async.config.reference import tables
from prime_async.config.schema import Config
from prime_async.config.template import node_toml
from prime_async.docs import (
    LINK,
    PAGES,
    events_on,
    find_page,
    page_names,
    page_of_class,
    read_page,
    terminal_text,
    title_of,
)
from prime_async.errors import PrimeAsyncError
from prime_async.machines.facts import Fact
from prime_async.messages import RefusalReason
from prime_async.node.switchboard import WARNINGS

ROOT: Final = Path(__file__).parent.parent
TEXTS: Final = {
    **{str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(PAGES.rglob("*.md"))},
    **{name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "deploy/README.md")},
}

RUN: Final = (
    "prime-async docs",
    "prime-async docs operating",
    "prime-async docs errors/refused",
    "prime-async docs leader_silent",
    "prime-async docs cut_off",
    "prime-async docs AddressInUseError",
    "prime-async plan --parameters 1e9 --step-s 2 --up-mbit 100 --nodes 8 --rtt-ms 150 --inner-steps 200",
    "prime-async lab DIR --list",
    "prime-async simulate --nodes 10 --rounds 1",
    "prime-async data book.txt",
    "prime-async init",
    "prime-async init second --join 5f0c8d0e6a2b4c19d7e3f1a05b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c@192.168.1.5:7700 "
    "--set node.name=second",
    "prime-async check node.toml",
    "prime-async invite node.toml",
    "prime-async invite node.toml --hours 2",
    "prime-async invite node.toml --no-token",
    "prime-async run node.toml",
    "prime-async replay messages.log",
    "prime-async replay messages.log --show --until 20",
    "prime-async replay messages.log --show --from 10 --until 20 --actor membership",
    "prime-async replay messages.log --against messages.log",
    "prime-async audit audit",
    "prime-async inspect node.toml",
    "prime-async inspect node.toml --no-verify --json",
    "prime-async run node.toml --leave-within 240",
    'prime-async generate node.toml "KING HENRY." --temperature 0.7 --top-p 0.95',
    "prime-async eval node.toml",
    "prime-async export node.toml model --dtype bfloat16",
    "prime-async recover node.toml",
    "prime-async recover node.toml --force",
    "prime-async recover node.toml --adopt",
    "prime-async restore node.toml",
)
"""In this order, in one directory, each as it stands in a page."""

PARSED: Final = {
    "prime-async join": "needs a member that runs, and its string; tests/test_join.py does it",
    "prime-async status": "needs a node that runs, with a dashboard; tests/test_watch.py does it",
    "prime-async demo": "takes a minute; tests/test_cli.py does it",
    "prime-async import": "needs another Llama and its text; tests/test_import.py does it",
    "prime-async data book.txt --tokenizer": "needs that Llama's tokenizer; tests/test_import.py does it",
    "prime-async lab DIR --methods": "trains for minutes; tests/test_lab_cli.py does it with a smaller one",
}
"""What is shown in a block of its own and not run here, by how it begins, with the reason."""

COMMAND = re.compile(r"^(?:\S*/)?(prime-async [a-z]+(?: .*)?)$")
NO_SETTINGS: Final = {"node.toml", "node.events", "node.stop"}


def blocks() -> Iterator[tuple[str, str]]:
    """Where a command stands in a block of its own, and the command."""
    for name, text in TEXTS.items():
        for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
            for line in block.splitlines() if not language else ():
                for part in line.partition(" # ")[0].split("&&"):
                    if found := COMMAND.match(part.strip()):
                        yield name, found.group(1).strip()


def mentions() -> Iterator[tuple[str, str]]:
    """Where a command with arguments stands in a sentence. An optional argument is left out, numbers are put in."""
    for name, text in TEXTS.items():
        outside = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for words in re.findall(r"`prime-async ([a-z]+ [^`]+)`", outside):
            plain = re.sub(r" \[[^\]]*\]", "", " ".join(words.split()))
            yield name, f"prime-async {re.sub(r'(?<= )[A-Z](?= |$)', '4', plain)}"


def only_parsed(line: str) -> bool:
    return any(line.startswith(beginning) for beginning in PARSED)


def parse(line: str) -> None:
    app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


# --- commands -------------------------------------------------------------------------------------------------------


def test_every_command_in_a_block_is_run_here_or_has_a_reason_not_to_be() -> None:
    shown = list(blocks())

    assert len(shown) > 60
    assert [(name, line) for name, line in shown if line not in RUN and not only_parsed(line)] == []
    assert set(RUN) <= {line for _, line in shown}, "run here, and shown nowhere"
    assert all(any(line.startswith(beginning) for _, line in shown) for beginning in PARSED)
    instead = {test for reason in PARSED.values() for test in re.findall(r"tests/\w+\.py", reason)}
    assert [test for test in instead if not (ROOT / test).is_file()] == []


@pytest.mark.parametrize(("name", "line"), [*dict.fromkeys([*blocks(), *mentions()])])
def test_every_command_that_is_shown_has_options_that_there_are(name: str, line: str) -> None:
    assert name
    parse(line)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], int]]:
    """Runs the real command in a directory of its own, and gives its exit status."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> int:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    yield run
    structlog.reset_defaults()  # the commands configure it


def small(home: Path) -> Config:
    """A run that takes seconds, by a node that leaves all files that there can be."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"port": one.getsockname()[1], "bulk_port": other.getsockname()[1]}
    run = {"rounds": 2, "sequence_length": 16, "round": {"inner_steps": 2}, "inner": {"batch_size": 1}}
    node = {"record": "messages.log", "audit": "audit", "remote": f"file://{home / 'copy'}"}
    return config_from(
        {"run": {"name": "my-run", **run}, "node": {"host": "127.0.0.1", "threads": 1, **ports, **node}}, "small"
    )


@pytest.mark.xdist_group("real time")
def test_the_commands_of_the_pages_do_what_the_pages_say(
    tmp_path: Path, command: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Given an empty directory, when every command that is shown runs in order, then all end well.

    The run that they tell of is founded, trained, looked at, recovered, and restored from its copy.
    """
    (tmp_path / "book.txt").write_text("To be, or not to be, that is the question.\n" * 50)

    for line in RUN:
        if line == "prime-async restore node.toml":
            shutil.move(tmp_path / "state", tmp_path / "lost")
        status = command(line)
        said = capfd.readouterr()
        assert status == 0, f"{line}: {status}\n{said.out}\n{said.err}"
        if line == "prime-async init":
            (tmp_path / "node.toml").write_text(node_toml(small(tmp_path)))

    assert "\ncarries on from round 2" in said.out, said.out
    assert (tmp_path / "model" / "config.json").is_file()
    assert list((tmp_path / "state").rglob("*.safetensors"))


# --- errors and events ----------------------------------------------------------------------------------------------


def classes_of(kind: type[PrimeAsyncError]) -> Iterator[type[PrimeAsyncError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from classes_of(each)


def test_every_error_has_a_page() -> None:
    """Given all errors of the package, those of `errors` have a page of their own, others at least that of a base."""
    for module in pkgutil.walk_packages(prime_async.__path__, "prime_async."):
        if not module.name.endswith("__main__") and not module.name.startswith("prime_async.bench.peers."):
            importlib.import_module(module.name)  # those need what they measure, and have no errors of their own
    kinds = {kind for kind in classes_of(PrimeAsyncError) if kind.__module__.startswith("prime_async.")}
    pages = {kind: page_of_class(kind) for kind in kinds}
    own = {kind: page for kind, page in pages.items() if kind.__module__ == "prime_async.errors"}

    assert len(kinds) > len(own) > 12
    assert None not in pages.values()
    assert len(set(own.values())) == len(own)
    assert [k for k, page in pages.items() if page == "errors/prime_async" and k is not PrimeAsyncError] == []


def test_an_error_of_the_command_ends_with_where_to_read_more(
    tmp_path: Path, command: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Given errors of two kinds, when a command ends with them, then the last line names the page, which there is."""
    (tmp_path / "node.toml").write_text('[run]\nname = "x"\nmode = "fast"\n')

    for line, status in (("prime-async run node.toml", 2), ("prime-async replay none.log", 1)):
        assert command(line) == status
        more = capsys.readouterr().err.splitlines()[-1].removeprefix("more: ")
        assert command(more) == 0
        assert title_of(read_page(more.split()[-1])).split(":")[0] in ("ConfigError", "LogFormatError")
        capsys.readouterr()


def log_events() -> set[str]:
    """Events at level warning or error that the library, or the command, writes by itself."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "prime_async").rglob("*.py")]
    return {event for text in sources for event in re.findall(r"\.(?:warning|error)\(\s*\"([a-z_]+)\"", text)}


def tag_of(kind: Any) -> str:
    return str(kind.__struct_config__.tag)


def test_every_warning_has_words_of_its_own() -> None:
    explained = frozenset[str]().union(*(events_on(read_page(name)) for name in page_names()))
    warnings = {tag_of(kind) for kind in WARNINGS} | log_events()

    assert len(warnings) > 30
    assert warnings - explained == set(), "give each a heading on a page of prime_async/docs/errors"


def test_every_reason_to_be_refused_has_words_of_its_own() -> None:
    assert set(get_args(RefusalReason)) <= events_on(read_page("errors/refused"))


def test_an_event_or_class_is_enough_to_find_a_page() -> None:
    assert find_page("member_lost") == "errors/member_lost"
    assert find_page("hello_refused") == "errors/refused"
    assert find_page("errors/hello_refused") == "errors/refused"
    assert find_page("DiskFullError") == find_page("StorageError") == "errors/storage"
    assert find_page("nothing_like_it") is None


def test_the_pages_name_events_and_fields_that_there_are() -> None:
    """Every word_with_an_underscore that is marked as one is an event, one of its fields, a reason, or a setting."""
    facts = get_args(Fact)
    known = {tag_of(kind) for kind in facts} | log_events() | set(get_args(RefusalReason))
    known |= {field for kind in facts for field in kind.__struct_fields__}
    known |= {s.key.rpartition(".")[2] for table in tables() for s in table.settings}
    known |= {choice for table in tables() for s in table.settings for choice in s.choices}
    known |= set(re.findall(r"log\.info\(\"([a-z_]+)\"", (ROOT / "prime_async/cli/run.py").read_text()))
    known |= {"open_checkpoint", "open_exchange", "open_membership"}

    for name in page_names():
        words = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", read_page(name)))
        assert words - known == set(), name


def test_the_pages_name_settings_that_there_are() -> None:
    known = {s.key for table in tables() for s in table.settings} | {table.key for table in tables()} | NO_SETTINGS

    named = {name: set(re.findall(r"`((?:run|node)\.[a-z_.]*[a-z_])", read_page(name))) for name in page_names()}
    assert sum(map(len, named.values())) > 80
    assert {name: keys - known for name, keys in named.items() if keys - known} == {}


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings_that_there_are(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def shipped() -> set[Path]:
    """The files beside the modules that an installed package has."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["prime_async"]
    package = ROOT / "prime_async"
    return {path for pattern in patterns for path in package.glob(pattern)}


def test_pages_link_to_nothing_that_an_installed_package_lacks() -> None:
    """Defect: links to the README, protocols/ and deploy/ led nowhere where only the wheel was installed."""
    links = [
        (name, ((PAGES / name).parent / path).resolve())
        for name in page_names()
        for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", read_page(name))
    ]

    assert len(links) > 40
    assert [(name, path) for name, path in links if path not in shipped()] == []
    assert {PAGES / f"{name}.md" for name in page_names()} <= shipped()


def test_a_page_in_the_terminal_says_how_to_show_those_that_it_links_to() -> None:
    """Then each of its commands shows a page that there is, and no link is left."""
    texts = {name: terminal_text(name) for name in page_names()}

    assert [name for name, text in texts.items() if LINK.search(text)] == []
    commands = {page for text in texts.values() for page in re.findall(r"\(`prime-async docs ([^`]+)`\)", text)}
    assert {"measurements", "operating"} <= commands <= set(page_names())
    assert "| local, config, data," in texts["errors/prime_async"]
    assert str(PAGES / "architecture.svg") in texts["architecture"]


def test_the_program_that_runs_a_node_is_the_same_in_the_readme_and_its_page() -> None:
    (program,) = [b for b in re.findall(r"^```python\n.*?^```$", TEXTS["README.md"], re.M | re.S) if "open_node(" in b]

    assert program in read_page("embedding")
