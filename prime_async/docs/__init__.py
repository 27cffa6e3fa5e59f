"""The pages that come with the program: Markdown files, in this folder, named as people ask for them.

A page about an error is called like the error's class, in the snake_case of event names: ``AddressInUseError`` is
``errors/address_in_use``. An event that needs words of its own has them under a heading that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prime_async.errors import PrimeAsyncError

PAGES = Path(__file__).parent
ERRORS = "errors"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([\w./-]+\.(?:md|svg))(?:#[^)]*)?\)")


def page_names() -> tuple[str, ...]:
    """All pages, the guides first, then those about errors."""
    guides, errors = sorted(PAGES.glob("*.md")), sorted((PAGES / ERRORS).glob("*.md"))
    return tuple(str(path.relative_to(PAGES).with_suffix("").as_posix()) for path in (*guides, *errors))


def read_page(name: str) -> str:
    """The Markdown of a page of ``page_names``."""
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def terminal_text(name: str) -> str:
    """The page as :func:`read_page` has it, but where it links to another it says how to show that in a terminal.

    A link whose text is the name of a page about an error is that name alone. A picture is the path of its file.
    """

    def said(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        target = ((PAGES / name).parent / path).resolve()
        if picture:
            return f"{text}: {target}"
        page = target.relative_to(PAGES.resolve()).with_suffix("").as_posix()
        is_name = page == f"{ERRORS}/{text}"
        return text if is_name else f"{text} (`prime-async docs {page}`)"

    return LINK.sub(said, read_page(name))


def find_page(name: str) -> str | None:
    """The page that ``name`` means: a page's name, an error's without its folder, or an event that has a heading."""
    names = page_names()
    wanted = name.removesuffix(".md")
    for candidate in (wanted, f"{ERRORS}/{wanted}", f"{ERRORS}/{_page_name(wanted)}"):
        if candidate in names:
            return candidate
    event = wanted.rpartition("/")[2]
    return next((page for page in names if event in events_on(read_page(page))), None)


def title_of(text: str) -> str:
    """The first heading of a page."""
    return text.partition("\n")[0].removeprefix("# ")


def events_on(text: str) -> frozenset[str]:
    """The events that have a heading on a page: ``## `cut_off```, or two with a comma between."""
    return frozenset(_events(text))


def page_of(error: PrimeAsyncError) -> str | None:
    """The page about ``error``, or about the nearest of its kind that has one."""
    return page_of_class(type(error))


def page_of_class(kind: type[BaseException]) -> str | None:
    """As :func:`page_of`, for a class of errors."""
    names = (f"{ERRORS}/{_page_name(c.__name__)}" for c in kind.__mro__)
    return next((name for name in names if name in page_names()), None)


def _events(text: str) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.*`.*)$", text, re.MULTILINE):
        yield from re.findall(r"`([A-Za-z_]+)`", heading)


def _page_name(kind: str) -> str:
    """``AddressInUseError`` -> ``address_in_use``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", re.sub(r"(Error|Fault)$", "", kind)).lower()
