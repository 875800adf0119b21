"""`duet report`: everything that was measured, on one page.

runs      folders of results -> methods
tables, figures, topk   what is shown; glossary: what its words mean
neighbours   kept answers by how near their questions are to what is forgotten
page      sections -> HTML and Markdown; report puts them together
"""

from ..._moved import names_of

__getattr__ = names_of(__name__)
