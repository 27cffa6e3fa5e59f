"""``prime-async docs``: the pages that come with the program, in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markdown import Markdown

from prime_async.docs import find_page, page_names, read_page, terminal_text, title_of
from prime_async.errors import ConfigError


def docs(page: str = "", /) -> int:
    """Show a page about running nodes, how they work, or an error. Without a page: list all.

    Parameters
    ----------
    page
        Its name, such as operating or errors/refused; the class of an error, or an event of the log, will do too.
    """
    console = Console(highlight=False)
    if page:
        console.print(Markdown(terminal_text(_found(page)), hyperlinks=False))
        return 0
    for name in page_names():
        console.print(f"{name:<28} {title_of(read_page(name))}", soft_wrap=True, markup=False)
    return 0


def _found(page: str) -> str:
    name = find_page(page)
    if name is None:
        raise ConfigError([f'there is no page "{page}": `prime-async docs` lists all'])
    return name
