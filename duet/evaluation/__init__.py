"""Has it really forgotten? Suites of questions (`duet eval`) and attacks (`duet attack`), on any causal language model.

metrics, row_metrics      numbers of texts and losses: pure functions
scoring, generation       what a model finds likely, and what it says: batches of token ids
suites, asking, runner    a YAML file -> rows -> rows.jsonl; `summary` makes means and intervals of them
target, attacks           the model under attack, and the table of attacks; `weights` and `distribution` do the rest
attack_run                runs them, the worst first in the report
journal                   results that survive interruption
"""
