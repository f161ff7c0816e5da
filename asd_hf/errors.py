from __future__ import annotations

import re

SECRET = re.compile(  # credentials in an address, a token of the Hub, a secret among the parameters of an address
    r"(?P<before>://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{20,}|"
    r"(?P<key>[?&][\w-]*(?:token|key|secret|password|signature)=)[^&\s]+",
    re.IGNORECASE,
)


class UserError(ValueError):
    """A mistake that the user can mend. The commands print it as one line, without a traceback, and exit with 2.

    Secrets in its text are replaced by `***`: it may quote what the Hub or an address said.
    """

    def __init__(self, text: str) -> None:
        super().__init__(without_secrets(text))


def without_secrets(text: str) -> str:
    return SECRET.sub(lambda match: f"{match['before'] or match['key'] or ''}***", text)
