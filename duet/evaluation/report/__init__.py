"""`duet report`: everything that was measured, on one page.

runs      folders of results -> methods
tables, figures, topk   what is shown
page      sections -> HTML and Markdown; report puts them together
"""

from ..._moved import names_of

__getattr__ = names_of(__name__)
