"""A pretrained model forgets a country or a person: `python -m benchmarks.studies.real`.

questions   facts about countries and people, and questions about neither
arms        the methods, and how each is run
job         one subject, one method, one seed -> a row
measure     what a model still tells, what it keeps, what attacks bring back
page        real.md from the rows
"""
