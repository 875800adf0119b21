"""The embedded default: a tiny synthetic world and the tiny model that learns it.

Everything here is small enough for two CPU cores, and nothing here is needed by a user who unlearns a real model.

    words         the raw material: names, cities, book titles, prizes, jobs
    facts         who is who; the questions about them and how the authors are split
    steering      what a system message may forbid, how a user may try to override it, how the model refuses
    tokenizer     a word-level chat tokenizer
    checkpoint    the folder of a base model
    workplace     one thread, and output folders that appear whole or not at all
    curriculum    the dialogues that the base model is pretrained on
    pretrain      `rebuild`: the base model, its quality report and the shipped checkpoint
    probes        greedy answers, plainly and under attacks, and what they say about forgetting
    scorecard     all numbers of one row of the table
    methods       one settings row -> one unlearned model, through DuetTrainer
    report        the table, the report and what was not withstood, from the numbers alone
    plots         two pictures
    tour          `run_demo`
"""
