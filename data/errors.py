"""The exception for problems in a user's data.

    raise DataError("pets.json: record 7 (id 'cat-7') turn 0 has the unknown role 'sytem'; use one of …")

A problem is one sentence on one line: the file, the record's index and id, the mistake and the fix. Several
problems found together are one exception, one line each.
"""


class DataError(ValueError):
    """The user's data cannot be used; `str` gives one line per problem."""

    def __init__(self, *problems: str):
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(map(_printable, self.args))


def _printable(text: str) -> str:
    """Escapes line ends, terminal codes and half characters, which names in a file may contain."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FileChangedError(DataError):
    """A file of records changed while it was in use. Unlike a bad record, it is never skipped."""
