"""HTML pages: Jinja templates of `assets/`, rendered so that no text in them can do anything.

A page is one file that needs nothing else: no script, no font, no network. Every text is escaped,
and control characters that would turn or hide what stands around them are written out. The
templates themselves are ours; no text of a user is ever compiled as one.
"""

import functools
from typing import TYPE_CHECKING

from phitune import __version__
from phitune.text import plural, shortened, visible

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **context: object) -> str:
    """A whole page.

    Args:
        template: its file's name in `assets/`.
        context: what the template shows; a name it uses and does not find here is an error.
    """
    return _environment().get_template(template).render(version=__version__, **context)


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("phitune", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plural=plural, shortened=shortened)
    return environment


def _shown(value: object) -> object:
    """What an expression of a template puts on the page, before it is escaped."""
    # What macros return is HTML already, and each of its parts went through here.
    return value if hasattr(value, "__html__") else visible(str(value))
