"""Kinds of things that a file, or another package, adds by being there: methods, tasks, metrics,
data sources.

A file of the kind's own package that defines a class of the kind with a ``name`` is one of them:
nothing to register. Classes of other packages come in by an entry point of the kind's group (any
installed package), or with ``register`` (a notebook, a script).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from fedgrove.ground.errors import JobError

Kind = TypeVar("Kind")
Class = TypeVar("Class", bound="type[Any]")


@dataclass
class Registry(Generic[Kind]):
    """The classes of one kind by their names.

    ``word`` is what one of them is called, ``key`` the job's key that chooses it, ``group`` the
    entry points' group, ``package`` where ours lie; ``base`` imports their common base class.
    """

    word: str
    key: str
    group: str
    package: str
    base: Callable[[], type[Any]]
    _registered: dict[str, type[Kind]] = field(default_factory=dict)
    _found: dict[str, type[Kind]] | None = None

    def register(self, kind: Class) -> Class:
        """Make a class known by its name in this process; a decorator. Defined again (a notebook's
        cell), it is replaced.

        Raises ``JobError`` where it has no name of its own, or that of one that is there already.
        """
        name = vars(kind).get("name")
        if not isinstance(name, str) or not name:
            raise JobError(
                f"{kind.__name__} has no name of its own; give the class an attribute such as "
                f"name = 'my-{self.word}'."
            )
        known = self.catalogue().get(name)
        if known is not None and name not in self._registered:
            raise JobError(
                f"{kind.__name__} is called '{name}', which is {title(known)} already; choose "
                f"another name."
            )
        self._registered[name] = kind
        self._found = None
        return kind

    def forget(self) -> None:
        """Unlearn what was registered in this process, and look again at what is installed."""
        self._registered.clear()
        self._found = None

    def catalogue(self) -> dict[str, type[Kind]]:
        """Every class by its name, in the order of the names."""
        if self._found is None:
            found = dict(self._own())
            for name, kind in self._installed():
                found.setdefault(name, kind)
            self._found = dict(sorted({**found, **self._registered}.items()))
        return self._found

    def names(self) -> list[str]:
        return list(self.catalogue())

    def find(self, name: str) -> type[Kind]:
        """The class of a name. Raises ``JobError`` where there is none."""
        try:
            return self.catalogue()[name]
        except KeyError:
            raise JobError(
                f"{self.key} is '{name}', which does not exist; there are "
                f"{', '.join(self.names())}."
            ) from None

    def _own(self) -> Iterator[tuple[str, type[Kind]]]:
        package, base = importlib.import_module(self.package), self.base()
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{self.package}.{module.name}")
            for value in vars(loaded).values():
                if isinstance(value, type) and issubclass(value, base) and named(value):
                    yield vars(value)["name"], value

    def _installed(self) -> Iterator[tuple[str, type[Kind]]]:
        for entry in entry_points(group=self.group):
            if entry.dist:
                where = entry.dist.name
            else:
                where = entry.value
            try:
                value = entry.load()
            except Exception as error:  # whatever another package's import may raise
                raise JobError(
                    f"the {self.word} '{entry.name}' of the package {where} cannot be loaded "
                    f"({type(error).__name__}: {error}); repair or uninstall it."
                ) from error
            self._check(value, entry, where)
            yield value.name, value

    def _check(self, value: Any, entry: EntryPoint, where: str) -> None:
        base = self.base()
        if not (isinstance(value, type) and issubclass(value, base) and named(value)):
            raise JobError(
                f"'{entry.value}' of the package {where} is no {self.word}: it must be a class "
                f"that extends {base.__module__}.{base.__name__} and has a name; repair or "
                f"uninstall it."
            )


def named(kind: type[Any]) -> bool:
    """Whether a class has a name of its own: what has none is a base of others."""
    return isinstance(vars(kind).get("name"), str)


def title(kind: type[Any]) -> str:
    """What people call a class: its title, else its name in quotes."""
    return str(getattr(kind, "title", None) or f"'{kind.name}'")
