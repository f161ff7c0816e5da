"""For mkdocs: links to files of the repository outside docs/, which a site does not have, become plain text."""

import re

LINK = re.compile(r"\[((?:`[^`]*`|[^\]`])*)\]\((?:\.\./[^)]*|evidence/[^)]*(?<!\.md)(?<!\.png))\)")


def on_page_markdown(markdown: str, **_) -> str:
    return LINK.sub(r"\1", markdown)
