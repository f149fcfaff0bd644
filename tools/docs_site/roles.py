"""Docstrings name other objects as Sphinx does, :func:`forward`; make that links of the site."""

import re

import griffe

import nsa

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Links to what the page of the API documents; code for everything else."""

    def on_object(self, *, obj, **_):
        """Change the docstring of every object that is loaded."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(
                lambda match: link(match[1], _owner(obj)), obj.docstring.value
            )


def link(name: str, owner: str = "") -> str:
    """The Markdown of a role; ``owner`` is the public class in whose docstring it stands."""
    first, _, member = name.removeprefix("nsa.").partition(".")
    if first in nsa.__all__:
        path = f"nsa.{first}" + (f".{member}" if member else "")
    elif owner and not member and hasattr(getattr(nsa, owner), first):
        path = f"nsa.{owner}.{first}"
    else:
        return f"`{name}`"
    return f"[`{name}`][{path}]"


def _owner(obj) -> str:
    cls = obj if obj.is_class else obj.parent
    return cls.name if cls is not None and cls.is_class and cls.name in nsa.__all__ else ""
