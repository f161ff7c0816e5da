"""For mkdocs: links to files of the repository outside docs/ become plain text, for a site does not have these files."""

import re

LINK = re.compile(r"\[((?:`[^`]*`|[^\]])*)\]\((?:\.\./[^)]*|evidence/[^)]*(?<!\.md)(?<!\.png))\)")


def on_page_markdown(markdown: str, **_) -> str:
    return LINK.sub(r"\1", markdown)
