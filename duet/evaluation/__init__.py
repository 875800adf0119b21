"""Suites of questions (`duet eval`), attacks (`duet attack`) and the report, for any causal language model.

metrics               numbers of texts and losses: pure functions
scoring, generation   log-probabilities of given answers; greedy and drawn answers: batches of token ids
suites/               a YAML file -> rows -> rows.jsonl -> means and intervals
attacks/              prompts, changes of the weights and probes that bring back what was forgotten
report/               all results on one page
facts, fact_sources   questions in several wordings; those of installed packages
elicit, told          the base's own answers as rows to forget and to keep; what counts as told
steering              what a model tells behind a steering prefix
values, words         rows and the texts in their columns; how texts are compared
refusals              which answers decline to say
chat                  answers side by side
models, journal       loading the model; results that can be continued
commands              the commands eval, attack and report
"""
