"""`python -m benchmarks.studies.tofu`: a Llama-shaped model learns TOFU from scratch, obeys steering, and then has to forget.

    rows        TOFU's files -> authors, and who is forgotten, kept, chosen on
    tokens      a byte-level BPE of the corpus with a chat template that has a system turn
    curriculum  what the model reads: plain questions, forbidden names, strangers
    pretrain    `full` (everything) and `retrained` (nothing about the forget authors), by transformers' Trainer
    base        instead of both: a pretrained folder (`--base`), fine-tuned on TOFU by adapters, piece by piece
    gates       does the full model know, does it obey, does the retrained one not know? Otherwise the study stops
    settings    sizes, thresholds and methods, as data; unlearning: one method through DuetTrainer
    examine     TOFU's numbers and the attacks, by duet.evaluation
    jobs        what is done, in which order, and what was done before; work: what each job does
    page        the table and the figure; reckoning: what it will cost

The data are read from a folder that is given; nothing of them is part of this package.
"""
