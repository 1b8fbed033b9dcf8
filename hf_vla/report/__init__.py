"""One self-contained HTML page for a run directory, made from its files alone.

What a run doesn't hold is named on the page where it would stand; a file that can't be read is an error. Words and
layout are in page.html.j2; these modules import nothing else of the package.
"""

from .page import write_report

__all__ = ["write_report"]
