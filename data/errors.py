"""The one exception for what a user's data gets wrong.

    raise DataError("pets.json: record 7 (id 'cat-7') turn 0 has the unknown role 'sytem'; use one of …")

A problem is one sentence on one line: the file, the record's index and id, what is wrong and what to
do. Several problems that are found together make one exception, a line each.
"""


class DataError(ValueError):
    """The data that the user gave cannot be used as it is; `str` gives a line for each problem."""

    def __init__(self, *problems: str):
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(map(_printable, self.args))


def _printable(text: str) -> str:
    """A file may name anything: line ends, terminal codes and half characters are shown, not sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FileChangedError(DataError):
    """A file of records that changed while it was in use. It is never skipped as a bad record may be."""
