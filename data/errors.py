"""The one exception for what a user's data gets wrong.

    raise DataError("pets.json: record 7 (id 'cat-7'): role 'sytem' is unknown; use user or assistant")

The message is one sentence that names the file, the record's index and id, what is wrong and what to do.
"""


class DataError(ValueError):
    """The data that the user gave cannot be used as it is; the message says where and why."""
