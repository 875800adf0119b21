"""What DUET leaves open, in the tiny world of the demo: `python -m benchmarks.studies.world`.

arms      what is compared, and the questions that set arms side by side
recipes   methods beyond the demo's, with their settings
job       one arm and one seed -> one row of numbers
page      the rows as tables, verdicts and study.md; figures draws its pictures
tune      chooses the demo's settings.json on the validation paraphrases
"""
