"""A run from a YAML file: `duet train`, `duet cache`, `duet merge` (commands), `duet plan`, `duet steer` and `duet shrink`.

config_file   the YAML file and what the command line changes in it -> one checked RunConfig
commands      what is done with it
steer         which steering prefix makes the model forget, and little else
shrink        a trained adapter, made smaller
schema        the keys of that file as a JSON schema; keys: the same for `duet train --help`, without imports
plan          the memory of a training step, before anything is loaded, from a simulation of it; plan_report shows it
"""

from .._moved import names_of

__getattr__ = names_of(__name__)
