from __future__ import annotations

import re

SECRET = re.compile(  # credentials in an address, a token of the Hub, a secret among the parameters of an address
    r"(?P<before>://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{20,}|"
    r"(?P<key>[?&#](?:[\w-]*(?:token|key|secret|password|signature)|sig)=)[^&\s]+",
    re.IGNORECASE,
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class UserError(ValueError):
    """A mistake that the user can mend. The commands print it as one line, without a traceback, and exit with 2.

    Its text may quote what others wrote. Secrets in it are replaced by `***`, and control characters by their escapes:
    a file name may hold line breaks and what a terminal obeys.
    """

    def __init__(self, text: str) -> None:
        super().__init__(CONTROL.sub(lambda match: repr(match[0])[1:-1], without_secrets(text)))


def without_secrets(text: str) -> str:
    return SECRET.sub(lambda match: f"{match['before'] or match['key'] or ''}***", text)
