"""Suites of questions (`duet eval`), attacks (`duet attack`) and the report, for any causal language model.

metrics               numbers of texts and losses: pure functions
scoring, generation   log-probabilities of given answers; greedy and drawn answers: batches of token ids
suites/               a YAML file -> rows -> rows.jsonl -> means and intervals
attacks/              prompts, changes of the weights and probes that bring back what was forgotten
report/               all results on one page
facts, steering       what a model tells, and what it tells behind a steering prefix; rows to forget and to keep
elicit, fact_sources  answers of rows that have none; facts of installed packages
values, words         texts in the columns of a row; how texts are compared
chat                  answers side by side
models, journal       loading the model; results that can be continued
commands              the commands eval, attack and report
"""
