from __future__ import annotations

import re

# A password in a URL (https://user:password@host), or a token of the Hub.
CREDENTIALS = re.compile(r"(?<=://)[^/?#\s@]+(?=@)|\bhf_[A-Za-z0-9]{20,}")


class UserError(ValueError):
    """A mistake that the user can mend. The commands print it as one line, without a traceback, and exit with 2.

    Credentials in its text are replaced by `***`: it may quote what the Hub or a URL said.
    """

    def __init__(self, text: str) -> None:
        super().__init__(CREDENTIALS.sub("***", text))
